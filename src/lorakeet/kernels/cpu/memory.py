"""Memory on a CPU for results that are soon given back, so that training takes a third less of it.

glibc's ``posix_memalign``, where torch's memory comes from, looks for up to 96 bytes more than it is asked for. So a tensor
does not fit where another one of its size lay before, and each layer of a forward pass leaves a hole in the heap for every
result that is not kept. Here such results are made a little larger than they are, each less so than the one before it: what
comes next, kept or not, fits where it lay.
"""

from __future__ import annotations

import itertools
import math
import threading

import torch
from torch import Tensor

#: A result is larger by more than those 96 bytes, and by that less than the one before, until all STEPS have been taken.
STEP, STEPS = 128, 512
#: So many times as large as what it is larger by is a result at least: smaller ones take fewer steps, the smallest none.
_SHARE = 64
_turn = itertools.count()


def passing(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor of ``like``'s dtype and device, for a result that is soon given back; its storage may be larger."""
    size = like.element_size()
    count = math.prod(shape)
    steps = min(STEPS, count * size // (STEP * _SHARE))
    if not steps or not like.is_cpu:
        return like.new_empty(shape)
    return like.new_empty(count + STEP * (steps - next(_turn) % steps) // size).resize_(shape)


class _Workspace(threading.local):
    """Bytes of a thread that stay."""

    def __init__(self) -> None:
        self.kept = torch.empty(0, dtype=torch.int8)


_workspace = _Workspace()


def workspace(count: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor [count] on the CPU for use until this thread asks again."""
    size = count * dtype.itemsize
    if _workspace.kept.numel() < size:
        _workspace.kept = torch.empty(size, dtype=torch.int8)
    return _workspace.kept[:size].view(dtype)
