"""Samples of different lengths to one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import DataError

#: The label of a position that is no target (torch's default ``ignore_index``).
IGNORED = -100


@dataclass(frozen=True)
class PaddingCollator:
    """Pads on the right to the longest sample of a batch.

    What is padding is known by position, never by token id: where the padding token is also the end token, the end of
    each sample is still learned.

    Args:
        pad_token_id: any id of the vocabulary; nothing is learned from it and nothing attends to it.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each int64 [batch, longest].

        A sample has ``input_ids`` and may have ``labels`` of the same length (-100: not learned); without them, every
        token is its own label. Other columns are left out. A causal model shifts the labels itself.

        Raises:
            DataError: no samples, a sample without tokens, or labels of another length.
        """
        if not samples:
            raise DataError("a batch of no samples, expected at least one")
        rows = [_row(number, sample) for number, sample in enumerate(samples)]
        shape = len(rows), max(len(ids) for ids, _ in rows)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for number, (ids, targets) in enumerate(rows):
            input_ids[number, : len(ids)] = ids
            attention_mask[number, : len(ids)] = 1
            labels[number, : len(ids)] = targets
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _row(number: int, sample: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    ids = torch.as_tensor(sample["input_ids"], dtype=torch.int64)  # [length]
    targets = sample.get("labels")
    labels = ids if targets is None else torch.as_tensor(targets, dtype=torch.int64)
    if not len(ids):
        raise DataError(f"sample {number} of a batch has no tokens")
    if labels.shape != ids.shape:
        raise DataError(f"sample {number} of a batch has {len(labels)} labels for {len(ids)} tokens")
    return ids, labels
