"""Encoders of plain texts, and of prompts with their completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorakeet.data.encode.encoder import Batch, CausalEncoder, Sample, with_end
from lorakeet.data.read.record import Fault
from lorakeet.facts.special_tokens import prompt_ids, trimmed


@dataclass(frozen=True)
class TextEncoder(CausalEncoder):
    """A text with the special tokens of its tokenizer and the end token after it. A text that is cut has no end."""

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        end = self.tokenizer.eos_token_id
        for number, ids in enumerate(self.token_ids(batch["text"])):
            ids = with_end(ids, end)
            sample = self.sample(ids, () if self.learn_all else [True] * len(ids))
            sample["ended"] = not sample["cut"] and end is not None and ids[-1:] == [end]
            yield number, sample


@dataclass(frozen=True)
class CompletionEncoder(CausalEncoder):
    """A prompt, the completion to be written after it, and the end token.

    Both are tokenized apart. So no token crosses their border, and the prompt has the same tokens as in generation.
    Some tokenizers put a space before every text, which must not appear in the middle of a sample. There the completion
    is tokenized after a line feed, whose tokens are dropped.
    """

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        end = self.tokenizer.eos_token_id
        prompts = self.prompts(batch["prompt"])
        for number, (prompt, completion) in enumerate(zip(prompts, self.completions(batch["completion"]), strict=True)):
            written = with_end(completion, end)
            sample = self.sample([*prompt, *written], [False] * len(prompt) + [True] * len(written))
            yield number, {**sample, "ended": not sample["cut"] and end is not None}

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the prompts, as generation has them.

        See :func:`lorakeet.facts.special_tokens.prompt_ids`.
        """
        return prompt_ids(self.tokenizer, texts)

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that continue another text."""
        texts = [trimmed(self.tokenizer, text) for text in texts]
        if not _adds_space(self.tokenizer):
            return list(self.tokens(texts, add_special_tokens=False)["input_ids"])
        after_feed = self.tokens([f"\n{text}" for text in texts], add_special_tokens=False, return_offsets_mapping=True)
        made = []
        for text, ids, offsets in zip(texts, after_feed["input_ids"], after_feed["offset_mapping"], strict=True):
            count = sum(end <= 1 for _, end in offsets)  # tokens of the line feed
            apart = all(start >= 1 for start, _ in offsets[count:])
            made.append(ids[count:] if apart else self.tokens([text], add_special_tokens=False)["input_ids"][0])
        return made


def _adds_space(tokenizer: Any) -> bool:
    """Whether a word at the beginning of a text becomes the token of a word after a space."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    alone, feed, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "\n", "\na"))
    return bool(after != [*feed, *alone])
