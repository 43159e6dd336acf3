"""A frozen linear layer and its low-rank update as one operation with a hand-written backward.

    h = x·W₀ᵀ + b + s·dropout(x)·Aᵀ·Bᵀ,   s = α/r          (Hu et al. 2021, arXiv:2106.09685, section 4.1)

    u   = dropout(x)·Aᵀ                    [n, r]
    ∂x  = g·W₀ + dropoutᵀ(s·g·B·A)         [n, in]
    ∂A  = (s·g·B)ᵀ·dropout(x)              [r, in]
    ∂B  = s·gᵀ·u                           [out, r]

What is remembered between forward and backward: x itself (the caller holds it anyway), u, and a seed. Nothing is stored
for the frozen weight, and the dropped-out copy of x is made again from the seed. The weight may be int8 with a scale for each
output channel; :mod:`lorakeet.kernels.int8.linear` then makes its two products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.dropout import draw_seed, dropout_reference, dropped, plus_dropped
from lorakeet.kernels.frozen_linear import linear_out
from lorakeet.kernels.int8 import linear
from lorakeet.kernels.int8.format import dequantize


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float = 0.0,
    mask: Tensor | None = None,
    fan_in_fan_out: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """The slow truth: the equation in plain torch, differentiated by autograd. ``mask`` as from ``keep_mask``."""
    weight = weight if scale is None else dequantize(weight, scale, x.dtype)
    h = F.linear(x, weight.T if fan_in_fan_out else weight, bias)
    low = x.to(lora_A.dtype)
    if mask is not None:
        low = dropout_reference(low, mask, p)
    delta = F.linear(F.linear(low, lora_A), lora_B) * scaling
    return (h + delta).to(h.dtype)


class _LoraLinear(torch.autograd.Function):
    """x [..., in], weight [out, in] ([in, out] with fan_in_fan_out), A [r, in], B [out, r] -> [..., out]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        p: float,
        seed: int,
        fan_in_fan_out: bool,
        scale: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # [n, in]
        u = _dropped(rows, lora_A.dtype, p, seed) @ lora_A.T  # [n, r]
        if scale is not None:
            h = linear.product(rows, weight, scale, bias, low_rank=(u * scaling, lora_B))
        else:
            h = linear_out(rows, weight if fan_in_fan_out else weight.T, bias)
            if h.dtype == lora_B.dtype:
                h.addmm_(u, lora_B.T, alpha=scaling)
            else:  # half-precision base, fp32 adapter: the sum is rounded once
                h = torch.addmm(h.to(lora_B.dtype), u, lora_B.T, alpha=scaling).to(h.dtype)
        ctx.save_for_backward(x, weight, lora_A, lora_B, u, scale)
        ctx.scaling, ctx.p, ctx.seed, ctx.fan_in_fan_out = scaling, p, seed, fan_in_fan_out
        return h if x.dim() == 2 else h.view(*x.shape[:-1], h.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, lora_A, lora_B, u, scale = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # [n, in]
        g = grad.reshape(rows.shape[0], grad.shape[-1])  # [n, out]
        g_low = g.to(lora_B.dtype)
        gu = (g_low @ lora_B) * ctx.scaling  # [n, r]
        dx = dA = dB = db = None
        if need_x and scale is not None and ctx.p == 0.0:
            dx = linear.input_gradient(g, weight, scale, low_rank=(gu, lora_A.T)).to(x.dtype).view(x.shape)
        elif need_x:
            if scale is None:
                dx = linear_out(g, weight.T if ctx.fan_in_fan_out else weight, None)  # [n, in]
            else:
                dx = linear.input_gradient(g, weight, scale)
            if ctx.p == 0.0 and dx.dtype == lora_A.dtype:
                dx.addmm_(gu, lora_A)
            else:
                low = gu @ lora_A
                dx = (plus_dropped(dx, low, ctx.p, ctx.seed) if ctx.p > 0.0 else dx + low).to(x.dtype)
            dx = dx.view(x.shape)
        if need_A:
            dA = gu.T @ _dropped(rows, lora_A.dtype, ctx.p, ctx.seed)
        if need_B:
            dB = (g_low.T @ u).mul_(ctx.scaling)
        if need_bias:
            db = g.sum(0)
        return dx, None, db, dA, dB, None, None, None, None, None


def _dropped(rows: Tensor, dtype: torch.dtype, p: float, seed: int) -> Tensor:
    """dropout(rows) in the adapter's dtype; a temporary, never stored."""
    rows = rows.to(dtype)
    return rows if p == 0.0 else dropped(rows, p, seed)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float = 0.0,
    fan_in_fan_out: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """Frozen linear layer plus its low-rank update.

    Args:
        x: [..., in], the dtype of ``weight`` (under autocast: any floating dtype).
        weight: [out, in], or [in, out] with ``fan_in_fan_out``; gets no gradient.
        bias: [out] or None.
        lora_A: [r, in]; with ``lora_B`` in one dtype, which may be wider than the weight's.
        lora_B: [out, r].
        scaling: s in the equation above.
        p: Dropout probability on the low-rank path; 0 when not training.
        fan_in_fan_out: How ``weight`` is stored.
        scale: fp32 [out] of an int8 ``weight`` [out, in]; None for a weight of floating dtype.

    Returns:
        [..., out], the dtype of ``weight``; with an int8 one the dtype of ``x``.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, lora_A, lora_B = (t.to(dtype) for t in (x, lora_A, lora_B))
        weight = weight.to(dtype) if scale is None else weight
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return _apply(x, weight, bias, lora_A, lora_B, scaling, p, fan_in_fan_out, scale)
    return _apply(x, weight, bias, lora_A, lora_B, scaling, p, fan_in_fan_out, scale)


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float,
    fan_in_fan_out: bool,
    scale: Tensor | None,
) -> Tensor:
    seed = draw_seed() if p > 0.0 else 0
    return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, p, seed, fan_in_fan_out, scale)
