"""Encoder of pairs of texts with one meaning, for embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakeet.data.encode.encoder import Batch, Encoder, Sample, ids_type
from lorakeet.data.read.record import Fault


@dataclass(frozen=True)
class PairEncoder(Encoder):
    """An anchor, a positive and perhaps a negative: ``input_ids``, ``positive_ids``, ``negative_ids``.

    Attributes:
        texts: the texts that every row has; an anchor alone is asked for its embedding.
    """

    texts: tuple[str, ...]

    def model_columns(self) -> dict[str, Any]:
        return dict.fromkeys(map(_column, self.texts), ids_type())

    def settings(self) -> list[Any]:
        return [*super().settings(), self.texts]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        encoded = {_column(name): self.shortened(batch[name]) for name in self.texts}
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


def _column(text: str) -> str:
    """Return the column of token ids of a text: anchor, positive or negative."""
    return "input_ids" if text == "anchor" else f"{text}_ids"
