"""Pace of an engine: times of its steps, and the number of tokens of prompts that a step can take without a stall."""

from __future__ import annotations

from collections.abc import Sequence

from lorakeet.serve.engine.rows import Row

#: Share of a measured time that the newest step has in the running mean.
_NEW = 0.2
#: Time that pieces of prompts may add to a step, as a share of a step without any. Streams then see steps of up to twice
#: their usual time while others begin.
_ADDED = 1.0
#: Tokens. The smallest piece of a prompt in a step, however slow the machine is.
_LEAST = 8


class Pace:
    """Running means of the seconds of a step of new tokens, and of a token of a prompt."""

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self.prompt_seconds: float | None = None

    def note(self, chosen: Sequence[tuple[Row, int]], seconds: float) -> None:
        """Take the time of a step into account.

        Args:
            chosen: Its rows, each with the number of its tokens.
            seconds: Its time.
        """
        prompt = sum(tokens for row, tokens in chosen if not row.decodes)
        decoding = any(row.decodes for row, _ in chosen)
        if not prompt:
            self.step_seconds = _mean(self.step_seconds, seconds)
        elif not decoding:
            self.prompt_seconds = _mean(self.prompt_seconds, seconds / prompt)
        elif self.step_seconds is not None:
            self.prompt_seconds = _mean(self.prompt_seconds, max(seconds - self.step_seconds, 0.0) / prompt)

    def tokens(self, most: int) -> int:
        """Return the number of tokens of prompts for a step in which others get new tokens, at most ``most``."""
        if not self.step_seconds or not self.prompt_seconds:
            return most
        return max(min(int(_ADDED * self.step_seconds / self.prompt_seconds), most), min(_LEAST, most))


def _mean(before: float | None, new: float) -> float:
    return new if before is None else (1 - _NEW) * before + _NEW * new
