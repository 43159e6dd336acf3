"""Encoder of texts whose tokens are masked anew in each batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakeet.chat.turns import check_offsets
from lorakeet.data.encode.encoder import Batch, Encoder, Sample, ids_type
from lorakeet.data.read.record import Fault


@dataclass(frozen=True)
class MaskedEncoder(Encoder):
    """A text, not masked yet.

    Attributes:
        whole_word: add the column ``words`` [length]: the word of each token, -1 for a special token.
    """

    whole_word: bool

    def __post_init__(self) -> None:
        if self.whole_word:
            check_offsets(self.tokenizer)

    def model_columns(self) -> dict[str, Any]:
        return {**super().model_columns(), **({"words": ids_type()} if self.whole_word else {})}

    def settings(self) -> list[Any]:
        return [*super().settings(), self.whole_word]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        for number, text in enumerate(self.shortened(batch["text"])):
            ids, counts = text.column("input_ids"), text.counts()
            sample = {"input_ids": ids, **counts, "targets": len(ids) - sum(text.column("special_tokens_mask"))}
            if self.whole_word:
                sample["words"] = [-1 if word is None else word for word in text.take(text.batch.word_ids(text.at))]
            yield number, sample
