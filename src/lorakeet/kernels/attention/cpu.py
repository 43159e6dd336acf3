"""fp32 attention on a CPU: one call of a compiled kernel for all samples of a row (``attention.c``).

torch's own kernel takes one batch of equal samples at a time; at forty positions it spends more time around the products
than in them. :mod:`lorakeet.kernels.attention.segment` has the reference and makes the choice.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.cpu.abi import HEAD_STEP, MAX_HEAD_WIDTH, Attention, Heads


def supports(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> bool:
    """Whether the kernel can read these tensors; it trusts shapes and lengths, and checks no bounds itself.

    Args:
        q: fp32 [total, h, d], last axis of stride 1.
        k: fp32 [total, h_kv, d], likewise.
        v: fp32 [total, h_kv, d], likewise.
        lengths: Positions of each sample; their sum is ``total``.
    """
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
    """Compute attention within each sample.

    Args:
        q: fp32 [total, h, d].
        k: fp32 [total, h_kv, d].
        v: fp32 [total, h_kv, d].
        lengths: Positions of each sample; their sum is ``total``.
        causal: Position i sees j ≤ i alone.
        window: As in :class:`lorakeet.kernels.attention.pattern.Pattern`.
        scale: Factor of the products of q and k.

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
    """Compute the gradients to q, k and v.

    Args:
        grad: fp32 [total, h, d], last axis of stride 1.
        q: As in :func:`forward`, and so are the arguments not listed here.
        k: fp32 [total, h_kv, d].
        v: fp32 [total, h_kv, d].
        output: [total, h, d] from :func:`forward`.
        sums: [total, h] from :func:`forward`.
        lengths: Positions of each sample.
        causal: Position i sees j ≤ i alone.
        window: Positions, or None.
        scale: Factor of the products of q and k.

    Returns:
        The gradients, in the shapes of q, k and v.
    """
    made = [q.new_empty(q.shape) for _ in range(3)]
    given, to = [_heads(t) for t in (grad, q, k, v, output)], [_heads(t) for t in made]
    bindings.library().lk_attention_backward(
        *given, sums.data_ptr(), *to, *_samples(lengths), _shape(q, k, causal, window, scale)
    )
    dq, *shares = made
    dk, dv = (part if q.shape[1] == k.shape[1] else part.unflatten(1, (k.shape[1], -1)).sum(2) for part in shares)
    return dq, dk, dv


def _samples(lengths: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the addresses of the samples' starts and lengths, and the number of samples."""
    starts, counts = sample_tensors(lengths)
    return starts.data_ptr(), counts.data_ptr(), len(lengths)


@lru_cache(maxsize=64)
def sample_tensors(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return int64 starts and lengths (cached: all layers of a step ask for the same ones)."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    return counts.cumsum(0) - counts, counts


def _shape(q: Tensor, k: Tensor, causal: bool, window: int | None, scale: float) -> Attention:
    return Attention(q.shape[1], k.shape[1], q.shape[2], window or 0, causal, scale)


def _heads(tensor: Tensor) -> Heads:
    return Heads(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))
