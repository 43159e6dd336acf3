"""Attention of several samples packed end to end into one row; no sample sees another.

    o_i = Σ_j softmax_j(c(s·q_i·k_j)) v_j ,   over the positions j of i's own sample that i may see

with s the scale and c(x) = x, or t·tanh(x/t) where scores are capped at t (Gemma 2). Causal: j ≤ i. A window of w: causal
i - w < j ≤ i, bidirectional |i - j| ≤ w. Key and value heads may be fewer than query heads; each serves
h/h_kv neighbouring ones (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245) without being copied.

Neighbouring samples of equal length form one batch: a view of the row, without gathering or padding. On a CPU all batches
together are one autograd node, which saves the output once and no slices. In fp32 forward and backward are one call of a
compiled kernel each (:mod:`lorakeet.kernels.attention.cpu`). On an NVIDIA GPU one kernel takes the whole row, if there is
one for the pattern (:mod:`lorakeet.kernels.attention.backends`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.attention import cpu
from lorakeet.kernels.attention.backends import available_kernels, choose_backend, packed_attention
from lorakeet.kernels.attention.pattern import Pattern


def segment_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], pattern: Pattern, scale: float | None = None
) -> Tensor:
    """Compute the reference: one dense score matrix over the whole row, other samples masked; no dropout.

    Args:
        q: [1, h, total, d].
        k: [1, h_kv, total, d].
        v: [1, h_kv, total, d_v].
        lengths: Positions of each sample.
        pattern: Which positions see which.
        scale: s above; 1/√d if None.

    Returns:
        [1, total, h, d_v].
    """
    rep = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(rep, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [1, h, total, total]
    if pattern.softcap is not None:
        scores = torch.tanh(scores / pattern.softcap) * pattern.softcap
    sample = torch.repeat_interleave(torch.tensor(lengths, device=q.device))
    positions = torch.arange(q.shape[2], device=q.device)
    distance = positions[:, None] - positions[None, :]
    sees = sample[:, None] == sample[None, :]
    if pattern.causal:
        sees &= distance >= 0
    if pattern.window is not None:
        sees &= distance < pattern.window if pattern.causal else distance.abs() <= pattern.window
    weights = _softmax(scores.masked_fill(~sees, float("-inf")))
    return (weights @ v).transpose(1, 2)


def _softmax(scores: Tensor) -> Tensor:
    """Compute softmax over the last axis, summed in fp32 or wider."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], pattern: Pattern, scale: float | None = None
) -> Tensor:
    """Compute attention within each sample of a row.

    Args:
        q: [1, h, total, d].
        k: [1, h_kv, total, d], h a multiple of h_kv.
        v: [1, h_kv, total, d_v].
        lengths: Positions of each sample, in order; their sum is ``total``. Samples of one length should be neighbours.
        pattern: Which positions see which.
        scale: s above; 1/√d if None.

    Returns:
        [1, total, h, d_v], the dtype of ``q`` (under autocast: that of autocast).
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    runs = [(len(list(same)), length) for length, same in itertools.groupby(lengths) if length]
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]  # [total, heads, d]
    heads, widths = (q.shape[1], k.shape[1]), (q.shape[-1], v.shape[-1])
    backend = choose_backend(available_kernels(q.device), q.device.type, q.dtype, heads, widths, pattern)
    present = tuple(length for length in lengths if length)
    if backend == "cpu":
        output: Tensor
        queries, keys, values = (_with_adjacent_values(t) for t in packed)
        if cpu.supports(queries, keys, values, present):
            output = _LoopAttention.apply(queries, keys, values, present, pattern, scale)
        else:
            output = _FlashAttention.apply(queries, keys, values, runs, pattern, scale)
        return output[None]
    if backend in ("torch_varlen", "flash_attn"):
        return packed_attention(backend, packed[0], packed[1], packed[2], present, pattern, scale)[None]
    attend = _attend if backend == "sdpa" else _attend_capped
    outputs = [
        attend(q_, k_, v_, pattern, scale).transpose(1, 2).flatten(0, 1)  # [count·length, h, d_v]
        for q_, k_, v_ in zip(*(_batches(t, runs) for t in packed), strict=True)
    ]
    return torch.cat(outputs)[None]


def _batches(packed: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    """Return views [count, heads, length, d] of a row [total, heads, d], one for each run of equal lengths."""
    parts = packed.split([count * length for count, length in runs])
    return [part.unflatten(0, run).transpose(1, 2) for part, run in zip(parts, runs, strict=True)]


def _attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float | None) -> Tensor:
    """Compute attention of equal samples, [count, h, length, d] each, with torch's kernels; [count, h, length, d_v]."""
    mask = pattern.mask(q.shape[2], q.device)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=pattern.dropout,
        is_causal=pattern.causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float | None) -> Tensor:
    """Compute what :func:`_attend` does with capped scores, in plain torch; O(length²) memory for each head."""
    assert pattern.softcap is not None
    length, heads = q.shape[2], k.shape[1]
    rep = q.shape[1] // heads
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q.unflatten(1, (heads, rep)).flatten(2, 3)  # [count, h_kv, rep·length, d]
    scores = (q @ k.transpose(2, 3)).unflatten(2, (rep, length))  # [count, h_kv, rep, length, length]
    scores = torch.tanh(scores * (scale / pattern.softcap)) * pattern.softcap
    mask = pattern.mask(length, q.device)
    if mask is None and pattern.causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(_softmax(scores), pattern.dropout)
    return (weights.flatten(2, 3) @ v).unflatten(2, (rep, length)).flatten(1, 2)


class _LoopAttention(torch.autograd.Function):
    """q [total, h, d], k and v [total, h_kv, d] -> [total, h, d]: the compiled kernel, all samples at once."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], pattern: Pattern, scale: float | None
    ) -> Tensor:
        ctx.settings = lengths, pattern.causal, pattern.window, q.shape[-1] ** -0.5 if scale is None else scale
        output, sums = cpu.forward(q, k, v, *ctx.settings)
        ctx.save_for_backward(q, k, v, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *cpu.backward(_with_adjacent_values(grad), *ctx.saved_tensors, *ctx.settings), None, None, None


class _FlashAttention(torch.autograd.Function):
    """q [total, h, d], k and v [total, h_kv, d] -> [total, h, d]: torch's CPU flash kernel, batch by batch."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: list[tuple[int, int]],
        pattern: Pattern,
        scale: float | None,
    ) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sums = []  # log Σ exp of each row of scores: [count, length, h]
        for q_, k_, v_, o_ in zip(*(_batches(t, runs) for t in (q, k, v, output)), strict=True):
            mask = pattern.mask(q_.shape[2], q_.device)
            made, lse = flash(
                q_, k_, v_, 0.0, pattern.causal and mask is None, attn_mask=_additive(mask, q), scale=scale
            )
            o_.copy_(made)
            sums.append(lse)
        ctx.save_for_backward(q, k, v, output, *sums)
        ctx.runs, ctx.pattern, ctx.scale = runs, pattern, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, output, *sums = ctx.saved_tensors
        grad = _with_adjacent_values(grad)
        gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
        batches = zip(*(_batches(t, ctx.runs) for t in (grad, q, k, v, output, *gradients)), strict=True)
        for (g_, q_, k_, v_, o_, *to), lse in zip(batches, sums, strict=True):
            mask = ctx.pattern.mask(q_.shape[2], q_.device)
            causal = ctx.pattern.causal and mask is None
            made = flash_backward(g_, q_, k_, v_, o_, lse, 0.0, causal, attn_mask=_additive(mask, q), scale=ctx.scale)
            for gradient, part in zip(to, made, strict=True):
                gradient.copy_(part)
        return (*gradients, None, None, None)


def _with_adjacent_values(packed: Tensor) -> Tensor:
    """Return a tensor [total, heads, d] whose last axis has stride 1; the kernels assume it without checking."""
    return packed if packed.stride(2) == 1 else packed.contiguous()


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the bias of the scores: 0 where the mask is True, -∞ elsewhere; [1, 1, length, length]."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, float("-inf"))[None, None]
