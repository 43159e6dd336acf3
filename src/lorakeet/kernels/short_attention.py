"""Attention of short samples in a row on a CPU, in fp32: one call of compiled loops for all of them (``short_attention.c``).

torch's own kernel is made for long rows: forty positions are called for one batch at a time, and cost more around the
products than in them. The slow truth is in :mod:`lorakeet.kernels.attention`, which chooses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels import native

#: Positions of a sample, and values of a head, that the loops have room for; widths are multiples of ``STEP``.
LONGEST, WIDEST, STEP = 256, 128, 16


class _Heads(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("token", ctypes.c_ssize_t), ("head", ctypes.c_ssize_t)]


class _Shape(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_ssize_t) for name in ("heads", "shared", "dim", "window")],
        ("causal", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


@cache
def _loops() -> tuple[Any, Any]:
    """Forward and backward of the library."""
    heads, size = ctypes.POINTER(_Heads), ctypes.c_ssize_t
    rest = [ctypes.c_void_p] * 2 + [size, ctypes.POINTER(_Shape)]
    forward, backward = native.library().short_attention, native.library().short_attention_backward
    forward.argtypes = [*[heads] * 4, ctypes.c_void_p, *rest]
    backward.argtypes = [*[heads] * 5, ctypes.c_void_p, *[heads] * 3, *rest]
    forward.restype = backward.restype = None
    return forward, backward


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the loops can read these, fp32 [total, heads, d] each, values of a head side by side."""
    width = q.shape[2]
    if any(t.dtype != torch.float32 or t.stride(2) != 1 or t.shape[2] != width or not t.numel() for t in (q, k, v)):
        return False
    plain = all(t.is_cpu and type(t) in native.PLAIN for t in (q, k, v))
    return plain and 0 < width <= WIDEST and width % STEP == 0 and native.library() is not None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    spans: tuple[tuple[int, int], ...],
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention of the samples at ``spans`` into ``output``.

    Args:
        q: fp32 [total, h, d].
        k, v: fp32 [total, h_kv, d].
        output: fp32 [total, h, d]; other positions stay as they are.
        spans: Start and length of each sample, of at most :data:`LONGEST` positions.
        causal, window: As of :class:`lorakeet.kernels.attention.Pattern`.
        scale: What products of q and k are multiplied by.

    Returns:
        log Σ exp of each row of scores, fp32 [total, h]; nothing of use at other positions.
    """
    sums = q.new_empty(q.shape[:2])
    starts, lengths = _tensors(spans)
    shape = _Shape(q.shape[1], k.shape[1], q.shape[2], window or 0, causal, scale)
    given = [_heads(t) for t in (q, k, v, output)]
    _loops()[0](*given, sums.data_ptr(), starts.data_ptr(), lengths.data_ptr(), len(spans), shape)
    return sums


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    sums: Tensor,
    gradients: Sequence[Tensor],
    spans: tuple[tuple[int, int], ...],
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    """The gradients to q, k and v at ``spans``, into ``gradients``, from ``grad`` [total, h, d]; else as :func:`forward`."""
    starts, lengths = _tensors(spans)
    shape = _Shape(q.shape[1], k.shape[1], q.shape[2], window or 0, causal, scale)
    given, made = [_heads(t) for t in (grad, q, k, v, output)], [_heads(t) for t in gradients]
    _loops()[1](*given, sums.data_ptr(), *made, starts.data_ptr(), lengths.data_ptr(), len(spans), shape)


@lru_cache(maxsize=64)
def _tensors(spans: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """int64 starts and lengths; every layer of a step asks for the same ones."""
    starts, lengths = torch.tensor(spans, dtype=torch.int64).T.contiguous()
    return starts, lengths


def _heads(tensor: Tensor) -> _Heads:
    return _Heads(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))
