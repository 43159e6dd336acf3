"""Pace of an engine: what a step costs by its tokens, and how many tokens of prompts it can take without a stall.

    cost = line(tokens) + attention · (positions that the tokens attend to) + apart · (pieces of prompts)

The line through a few sizes and both prices are measured before the first step. Afterwards each step corrects two factors:
how slow the machine is now, and what tokens of prompts cost beside those of answers.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from dataclasses import dataclass

import torch

from lorakeet.serve.engine.forward import Forward, Piece, Sequence

#: Tokens of the step that is measured with and without earlier tokens to attend to, and the most of these.
_AFEW, _PAST = 8, 1024
#: Tokens of the steps that are measured, in order; the first two are always. Beyond 32 other loops begin.
_SIZES = (1, _AFEW, 4, 16, 32, 33, 12, 24, 48, 2)
#: Seconds after which no further size is measured; the line goes on straight.
_MEASURING = 0.4
#: Share of a step of one token. A piece that adds more time to a step is a pass of its own; less is noise.
_A_PASS = 0.5
#: Time that pieces of prompts may add to a step, as a share of a step without any: streams then see steps of up to twice
#: their usual time while others begin. Where a piece is a pass of its own, as a share of that pass.
_ADDED, _ADDED_APART = 1.0, 1.5
#: Share of the newest step's ratio in a factor, as an exponent. A step counts as at most twice as slow, or as fast, as
#: expected, so a single slow one moves a factor by a tenth.
_NEW, _FURTHEST = 0.15, 2.0
#: Bounds of the factor for tokens of prompts.
_PROMPT = (0.5, 3.0)


@dataclass(frozen=True, slots=True)
class Load:
    """Work of a step.

    Attributes:
        tokens: Number of its tokens.
        attended: Positions that they attend to, in all.
        pieces: Sequences that they belong to.
    """

    tokens: int = 0
    attended: int = 0
    pieces: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.tokens + other.tokens, self.attended + other.attended, self.pieces + other.pieces)


def load_of(position: int, tokens: int) -> Load:
    """Return the work of tokens of one sequence that begin at a position."""
    return Load(tokens, tokens * position + tokens * (tokens + 1) // 2, 1)


class Pace:
    """Expected seconds of a step.

    Attributes:
        slowness: Factor of all times.
        prompt: Factor of what tokens of prompts add to a step of new tokens.
    """

    def __init__(self) -> None:
        self._line: list[tuple[int, float]] = []  # tokens and seconds of the measured steps
        self._attention = 0.0  # seconds for each attended position
        self._apart = 0.0  # seconds for each piece of a prompt, beside those for its tokens
        self.slowness = self.prompt = 1.0

    @torch.inference_mode()
    def measure(self, forward: Forward, window: int | None = None) -> None:
        """Measure a few steps on free pages, as far as these reach.

        Args:
            forward: The forward pass; one without pages never cuts a prompt, so nothing is measured.
            window: The model's window, in tokens.
        """
        if forward.pages is None:
            return
        room = min(forward.pages.free * forward.pages.page_tokens, window or _PAST + _AFEW)
        until = time.monotonic() + _MEASURING
        line: dict[int, float] = {}
        for size in _SIZES:
            if size > room - _AFEW or (len(line) > 1 and time.monotonic() > until):
                break
            line[size] = _measured(forward, (0, size))
        fastest = itertools.accumulate((line[size] for size in sorted(line, reverse=True)), min)
        self._line = sorted(zip(sorted(line, reverse=True), fastest, strict=True))  # more tokens are never faster
        past = min(_PAST, room - 2 * forward.pages.page_tokens - _AFEW)
        if _AFEW in line and past > 0:
            added = _measured(forward, (past, _AFEW)) - line[_AFEW]
            self._attention = max(added, 0.0) / (_AFEW * past)
            together = _measured(forward, (0, 1), (0, _AFEW))
            apart = together - self._line_at(_AFEW + 1)
            self._apart = apart if apart > _A_PASS * self._line[0][1] else 0.0

    def seconds(self, answers: Load, prompts: Load) -> float:
        """Return the expected time of a step.

        Args:
            answers: Work for new tokens.
            prompts: Work for pieces of prompts.
        """
        alone = self._cost(answers)
        added = self._cost(answers + prompts) - alone + self._apart * prompts.pieces
        return self.slowness * (alone + self.prompt * added)

    def _cost(self, load: Load) -> float:
        return self._line_at(load.tokens) + self._attention * load.attended

    def _line_at(self, tokens: int) -> float:
        if not tokens or not self._line:
            return 0.0
        if len(self._line) == 1:
            return self._line[0][1]
        at = min(max(bisect_left(self._line, (tokens, 0.0)), 1), len(self._line) - 1)
        (low, before), (high, after) = self._line[at - 1 : at + 1]
        return before + (after - before) * (tokens - low) / (high - low)

    def note(self, answers: Load, prompts: Load, seconds: float) -> None:
        """Update the factors by a step's time."""
        expected = self.seconds(answers, prompts)
        if expected <= 0 or seconds <= 0:
            return
        change = min(max(seconds / expected, 1 / _FURTHEST), _FURTHEST) ** _NEW
        self.slowness *= change
        if answers.tokens and prompts.tokens:
            self.prompt = min(max(self.prompt * change, _PROMPT[0]), _PROMPT[1])

    def fitting(self, answers: Load, prompts: Load, position: int, most: int) -> int:
        """Return how many tokens of a further prompt a step can take, at most ``most``.

        Args:
            answers: Work for new tokens.
            prompts: Work for pieces of prompts that the step has already.
            position: Position of the prompt's next token.
            most: Largest number.
        """
        alone = self.seconds(answers, Load())
        if not alone:
            return most
        limit = alone + max(_ADDED * alone, _ADDED_APART * self.slowness * self.prompt * self._apart)

        def is_over(tokens: int) -> bool:
            return self.seconds(answers, prompts + load_of(position, tokens)) > limit

        count = bisect_left(range(1, most + 1), True, key=is_over)
        return count if prompts.tokens else max(count, min(most, 1))  # a prompt goes on, if slowly


def _measured(forward: Forward, *rows: tuple[int, int]) -> float:
    """Return the seconds of a step, the fastest of three.

    Args:
        forward: The forward pass.
        rows: Numbers of stored and of new tokens of each sequence.
    """
    pool = forward.pages
    assert pool is not None
    sequences = [Sequence(pages=pool.take(pool.needed(past + new)), length=past) for past, new in rows]
    pieces = [Piece(sequence, [0] * new) for sequence, (_, new) in zip(sequences, rows, strict=True)]
    times = []
    for _ in range(3):
        began = time.monotonic()
        forward.run(pieces)
        times.append(time.monotonic() - began)
    for sequence in sequences:
        for page in sequence.pages:
            pool.release(page)
    return min(times)
