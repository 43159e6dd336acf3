"""Encoder of pairs of texts with one meaning, for embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakeet.data.encode.encoder import IDS, Batch, Encoder, Sample
from lorakeet.data.read.record import Fault


@dataclass(frozen=True)
class PairEncoder(Encoder):
    """An anchor, a positive and perhaps a negative: ``input_ids``, ``positive_ids``, ``negative_ids``.

    Attributes:
        negatives: every row has a negative.
    """

    negatives: bool

    def model_columns(self) -> dict[str, Any]:
        return dict.fromkeys(self._texts(), IDS)

    def settings(self) -> list[Any]:
        return [*super().settings(), self.negatives]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        encoded = {name: self.shortened(batch[role]) for name, role in self._texts().items()}
        for number in range(len(batch["anchor"])):
            texts = {name: encodings[number] for name, encodings in encoded.items()}
            ids = {name: text.column("input_ids") for name, text in texts.items()}
            yield (
                number,
                {
                    **ids,
                    "length": max(map(len, ids.values())),
                    "whole": max(text.whole for text in texts.values()),
                    "targets": int(all(ids.values())),
                    "cut": any(text.counts()["cut"] for text in texts.values()),
                },
            )

    def _texts(self) -> dict[str, str]:
        texts = {"input_ids": "anchor", "positive_ids": "positive"}
        return {**texts, "negative_ids": "negative"} if self.negatives else texts
