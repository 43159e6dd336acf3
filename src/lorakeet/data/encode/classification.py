"""Encoder of texts, or pairs of texts, with a label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from lorakeet.data.encode.encoder import Batch, Encoder, Sample, ids_type
from lorakeet.data.read.record import Fault
from lorakeet.data.rows.label_set import LabelSet


@dataclass(frozen=True)
class ClassificationEncoder(Encoder):
    """A text or pair of texts, and its label: int64; float32 [classes] for multi_label; float32 for regression.

    Attributes:
        names: the labels; None: the rows have none, and neither do the samples.
        pairs: every row has a second text, ``text_pair``.
    """

    names: LabelSet | None
    pairs: bool

    def model_columns(self) -> dict[str, Any]:
        fraction = datasets.Value("float32")
        kinds = {"multi_label": datasets.List(fraction), "regression": fraction}
        columns = {**super().model_columns(), **(type_id_columns(self.tokenizer) if self.pairs else {})}
        if self.names is not None:
            columns["labels"] = kinds.get(self.names.problem or "", datasets.Value("int64"))
        return columns

    def settings(self) -> list[Any]:
        names = () if self.names is None else (self.names.names, self.names.problem)
        return [*super().settings(), *names, self.pairs]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        texts = [batch["text"], batch["text_pair"]] if self.pairs else [batch["text"]]
        columns = [name for name in self.model_columns() if name != "labels"]
        for number, encoding in enumerate(self.shortened(*texts)):
            counts = encoding.counts()
            sample = {**counts, "targets": int(counts["length"] > 0)}
            sample |= {name: encoding.column(name) for name in columns}
            if self.names is not None:
                try:
                    sample["labels"] = self.names.target(batch["label"][number])
                except ValueError as error:
                    yield number, Fault("label_unknown", str(error))
                    continue
            yield number, sample


def type_id_columns(tokenizer: Any) -> dict[str, Any]:
    """Return the column that tells the model which of two texts a token belongs to, where the model has such an input."""
    return {"token_type_ids": ids_type()} if "token_type_ids" in tokenizer.model_input_names else {}
