"""Short-lived CPU buffers, sized to avoid heap fragmentation (training uses a third less memory).

torch allocates with glibc's ``posix_memalign``, which searches for up to 96 bytes more than it is asked for. A tensor
then does
not fit into the hole that one of its own size left. So each layer of a forward pass leaves a hole for every result that it
frees. Here these results are padded, each a little less than the one before. The next tensor, short-lived or not, then fits
into the hole.
"""

from __future__ import annotations

import itertools
import math
import threading
from bisect import insort

import torch
from torch import Tensor

#: Bytes. The padding decreases by STEP from one result to the next (more than the 96 bytes), and starts again after STEPS.
STEP, STEPS = 128, 512
#: Padding is at most 1/64 of a result's size; results too small for one STEP get none.
_SHARE = 64
_turn = itertools.count()


def transient_empty(like: Tensor, *shape: int) -> Tensor:
    """Allocate a tensor for a short-lived result, of ``like``'s dtype and device; its storage may be padded."""
    size = like.element_size()
    count = math.prod(shape)
    steps = min(STEPS, count * size // (STEP * _SHARE))
    if not steps or not like.is_cpu:
        return like.new_empty(shape)
    return like.new_empty(count + STEP * (steps - next(_turn) % steps) // size).resize_(shape)


class BufferPool:
    """CPU buffers that are used again as soon as no tensor refers to them, so that passes take no new memory from the system.

    A buffer counts as free by the number of references to its storage. So tensors that autograd has saved keep theirs,
    whatever becomes of the pass. Inside of a dispatch mode, as in one that counts bytes, every tensor is new.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []  # by size
        self._lock = threading.Lock()

    def empty(self, count: int) -> Tensor:
        """Return an uninitialized fp32 tensor [count]; free buffers that are too small make room for larger ones."""
        if torch._C._len_torch_dispatch_stack():
            return torch.empty(count, dtype=torch.float32)
        with self._lock:
            if (place := self._free(count)) is None:  # a pass of more tokens
                self._buffers = [buffer for buffer in self._buffers if _references(buffer) > 1]
                fitting = torch.empty(count, dtype=torch.float32)
            else:
                fitting = self._buffers.pop(place)
            insort(self._buffers, fitting, key=Tensor.numel)  # behind its equals, which are free earlier
            return fitting[:count]

    def _free(self, count: int) -> int | None:
        """Return the place of the smallest free buffer of ``count`` values or more; None if there is none."""
        for place, buffer in enumerate(self._buffers):
            if buffer.numel() >= count and _references(buffer) == 1:
                return place
        return None


def _references(buffer: Tensor) -> int:
    """Count the tensors that refer to the storage of a buffer."""
    storage = buffer.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # without ``storage`` itself


class _Workspace(threading.local):
    """Scratch memory of one thread; it grows and is never freed."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.int8)


_workspace = _Workspace()


def workspace(count: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized CPU tensor [count], valid until this thread asks again."""
    size = count * dtype.itemsize
    if _workspace.buffer.numel() < size:
        _workspace.buffer = torch.empty(size, dtype=torch.int8)
    return _workspace.buffer[:size].view(dtype)
