"""Count of the bytes of live tensors, now and at most, of everything that torch computes in a context."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of tensors that are made inside and still alive; a storage that several share counts once.

    Args:
        known: Tensors from before, and modules whose weights are; views of them do not count.

    Attributes:
        now: Bytes that are alive.
        most: Most bytes alive at a time, since :meth:`restart`.
    """

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for each in known for tensor in _tensors(each)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._count(each)
        return out

    def restart(self) -> None:
        """Set the peak back to what is alive now."""
        self.most = self.now

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self._known or tensor.is_meta:
            return
        if number not in self._sizes:
            weakref.finalize(storage, self._free, number).atexit = False
        self.now += size - self._sizes.get(number, 0)  # a storage may have grown
        self._sizes[number] = size
        self.most = max(self.most, self.now)

    def _free(self, number: int) -> None:
        self.now -= self._sizes.pop(number, 0)


def _tensors(each: Any) -> Iterable[Tensor]:
    if isinstance(each, nn.Module):
        return [t for p in (*each.parameters(), *each.buffers()) for t in (p, p.grad) if t is not None]
    return [each] if isinstance(each, Tensor) else [leaf for leaf in tree_leaves(each) if torch.is_tensor(leaf)]
