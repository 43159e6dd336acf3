"""Plain texts, and prompts with their completions, to samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorakeet.data.encode.encoder import Batch, CausalEncoder, Sample


@dataclass(frozen=True)
class TextEncoder(CausalEncoder):
    """A text with the special tokens of its tokenizer, and the end token after it; a text that is cut has no end."""

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        end = self.tokenizer.eos_token_id
        for number, ids in enumerate(self.tokens(batch["text"])["input_ids"]):
            ids = with_end(ids, end)
            sample = self.sample(ids, [True] * len(ids))
            yield number, {**sample, "ended": not sample["cut"] and end is not None and ids[-1:] == [end]}


@dataclass(frozen=True)
class CompletionEncoder(CausalEncoder):
    """A prompt, what is to be written after it, and the end token.

    The two are tokenised apart: so no token reaches across their border, and the prompt becomes the very tokens that
    generation makes of it. A tokenizer that puts a space before every text must not put one into the middle of a sample:
    there the completion is tokenised behind a line feed, whose tokens are dropped.
    """

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        end = self.tokenizer.eos_token_id
        prompts = self.prompts(batch["prompt"])
        for number, (prompt, completion) in enumerate(zip(prompts, self.completions(batch["completion"]), strict=True)):
            written = with_end(completion, end)
            ids = [*prompt, *written]
            sample = self.sample(ids, [False] * len(prompt) + [True] * len(written))
            yield number, {**sample, "ended": not sample["cut"] and end is not None}

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the prompts, as generation has them.

        One that begins with a start token gets no second one; the end token that some tokenizers put after any text is
        left out.
        """
        first, last = self.tokenizer.bos_token or "\0", self.tokenizer.eos_token or "\0"
        made = []
        for text, ids in zip(texts, self.tokens(texts)["input_ids"], strict=True):
            if text.startswith(first):
                ids = self.tokens([text], add_special_tokens=False)["input_ids"][0]
            made.append(ids if text.endswith(last) else without_end(ids, self.tokenizer.eos_token_id))
        return made

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that go on another one."""
        if not _puts_a_space(self.tokenizer):
            return list(self.tokens(texts, add_special_tokens=False)["input_ids"])
        behind = self.tokens([f"\n{text}" for text in texts], add_special_tokens=False, return_offsets_mapping=True)
        made = []
        for text, ids, offsets in zip(texts, behind["input_ids"], behind["offset_mapping"], strict=True):
            count = sum(end <= 1 for _, end in offsets)  # tokens of the line feed
            apart = all(start >= 1 for start, _ in offsets[count:])
            made.append(ids[count:] if apart else self.tokens([text], add_special_tokens=False)["input_ids"][0])
        return made


def with_end(ids: Sequence[int], end: int | None) -> list[int]:
    """``ids`` and the end token, unless it stands there already, or there is none."""
    return [*ids] if end is None or list(ids[-1:]) == [end] else [*ids, end]


def without_end(ids: Sequence[int], end: int | None) -> list[int]:
    """``ids`` without the end tokens at their end."""
    count = len(ids)
    while count and ids[count - 1] == end:
        count -= 1
    return list(ids[:count])


def _puts_a_space(tokenizer: Any) -> bool:
    """Whether a word at the beginning of a text becomes the token of a word behind a space."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    alone, feed, behind = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "\n", "\na"))
    return bool(behind != [*feed, *alone])
