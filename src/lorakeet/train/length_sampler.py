"""Sampler that sorts the samples of each optimizer step by length, so that micro-batches have little padding.

Each step keeps its samples, and the loss is a mean over the step's targets. So the gradient of the step is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from torch.utils.data import Sampler


class LengthWindows(Sampler[int]):
    """Sampler in the order of ``inner``, each window of ``size`` samples sorted by falling length.

    Args:
        inner: A sampler of row numbers; its ``set_epoch`` is called if it has one.
        lengths: Tokens of each row.
        size: Samples per optimizer step, over all processes.
    """

    def __init__(self, inner: Sampler[int], lengths: Sequence[int], size: int) -> None:
        self.inner, self.lengths, self.size = inner, lengths, size

    def __iter__(self) -> Iterator[int]:
        rows = iter(self.inner)
        while window := list(islice(rows, self.size)):
            yield from sorted(window, key=lambda row: -self.lengths[row])  # stable: equal lengths keep their order

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Use another order for each pass over the data."""
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)
