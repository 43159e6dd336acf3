"""Attention of the samples in a row on a CPU, in fp32: one call of compiled loops for all of them (``attention.c``).

torch's own kernel takes one batch of equal samples at a time, and of forty positions it spends more around the products than
in them. The slow truth is in :mod:`lorakeet.kernels.attention.segment`, which chooses.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.cpu.abi import HEAD_STEP, MAX_HEAD_WIDTH, Attention, Heads


def takes(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> bool:
    """Whether the loops can read these, fp32 [total, heads, d] each, values of a head side by side: they go through memory as
    shapes and lengths tell them to."""
    total, heads, width = q.shape
    if k.shape != v.shape or k.shape[::2] != (total, width) or not q.numel() or not k.numel() or heads % k.shape[1]:
        return False
    if sum(lengths) != total or width > MAX_HEAD_WIDTH or width % HEAD_STEP or torch.compiler.is_compiling():
        return False
    plain = all(
        t.is_cpu and t.dtype == torch.float32 and t.stride(2) == 1 and type(t) in bindings.PLAIN for t in (q, k, v)
    )
    return plain and bindings.library() is not None


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention within each sample.

    Args:
        q: fp32 [total, h, d].
        k, v: fp32 [total, h_kv, d].
        lengths: Positions of each sample; their sum is ``total``.
        causal, window: As of :class:`lorakeet.kernels.attention.segment.Pattern`.
        scale: What products of q and k are multiplied by.

    Returns:
        fp32 [total, h, d], and log Σ exp of each row of scores, [total, h].
    """
    output, sums = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    given = [_heads(t) for t in (q, k, v, output)]
    bindings.library().lk_attention_forward(
        *given, sums.data_ptr(), *_samples(lengths), _shape(q, k, causal, window, scale)
    )
    return output, sums


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    sums: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to q, k and v from ``grad`` [total, h, d], values of a head side by side; the rest as in
    :func:`forward`."""
    made = [q.new_empty(q.shape) for _ in range(3)]
    given, to = [_heads(t) for t in (grad, q, k, v, output)], [_heads(t) for t in made]
    bindings.library().lk_attention_backward(
        *given, sums.data_ptr(), *to, *_samples(lengths), _shape(q, k, causal, window, scale)
    )
    dq, *shares = made
    dk, dv = (part if q.shape[1] == k.shape[1] else part.unflatten(1, (k.shape[1], -1)).sum(2) for part in shares)
    return dq, dk, dv


def _samples(lengths: tuple[int, ...]) -> tuple[int, int, int]:
    """Where starts and lengths of the samples lie, and how many there are."""
    starts, counts = _tensors(lengths)
    return starts.data_ptr(), counts.data_ptr(), len(lengths)


@lru_cache(maxsize=64)
def _tensors(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """int64 starts and lengths; every layer of a step asks for the same ones."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    return counts.cumsum(0) - counts, counts


def _shape(q: Tensor, k: Tensor, causal: bool, window: int | None, scale: float) -> Attention:
    return Attention(q.shape[1], k.shape[1], q.shape[2], window or 0, causal, scale)


def _heads(tensor: Tensor) -> Heads:
    return Heads(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))
