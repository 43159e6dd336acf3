"""The order of samples: within one optimizer step, neighbours of one length share a micro-batch.

Which samples a step learns from stays as it was, and the loss is a mean over the step's targets, so the step's
gradient is the same; only less padding is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from torch.utils.data import Sampler


class LengthWindows(Sampler[int]):
    """The order of ``inner``, each window of ``size`` samples sorted by falling length.

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
        """Another order for each pass over the data."""
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)
