"""A frozen linear layer and its low-rank update as one operation with a hand-written backward.

    h = x·W₀ᵀ + b + s·dropout(x)·Aᵀ·Bᵀ,   s = α/r          (Hu et al. 2021, arXiv:2106.09685, section 4.1)

    u   = dropout(x)·Aᵀ                    [n, r]
    ∂x  = g·W₀ + dropoutᵀ(s·g·B·A)         [n, in]
    ∂A  = (s·g·B)ᵀ·dropout(x)              [r, in]
    ∂B  = s·gᵀ·u                           [out, r]

Saved between forward and backward: x itself (which the caller holds anyway; not where A is frozen), u, and a seed. Nothing is
saved for the frozen weight, and the dropped-out copy of x is recomputed from the seed. A quantized weight computes its two
products itself (:class:`FrozenWeight`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.cpu.ordered_product import add_low_rank_, low_rank_gradient, low_rank_tokens
from lorakeet.kernels.dropout import draw_seed, dropout_reference, dropped, plus_dropped
from lorakeet.kernels.frozen_linear import linear_out


class FrozenWeight(Protocol):
    """A weight [out, in] in a format of its own, as far as this module needs it (``lorakeet.quant`` has such formats)."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name."""

    def product(self, x: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None) -> Tensor:
        """Compute x·Wᵀ + b + u·vᵀ without autograd; x [n, in], u [n, r], v [out, r]."""

    def input_gradient(self, g: Tensor, low_rank: tuple[Tensor, Tensor] | None) -> Tensor:
        """Compute g·W + u·vᵀ without autograd; g [n, out], u [n, r], v [in, r]."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return W in a floating dtype."""


def lora_linear_reference(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float = 0.0,
    mask: Tensor | None = None,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """Compute the reference: the equation in plain torch, differentiated by autograd.

    Args:
        x: [..., in].
        weight: [out, in], or [in, out] with ``fan_in_fan_out``, or a quantized weight.
        bias: [out] or None.
        lora_A: [r, in].
        lora_B: [out, r].
        scaling: s in the equation.
        p: Dropout probability.
        mask: Dropout mask of :func:`lorakeet.kernels.dropout.keep_mask`; None: no dropout.
        fan_in_fan_out: The weight is stored as [in, out].

    Returns:
        [..., out].
    """
    dense = weight if isinstance(weight, Tensor) else weight.dequantize(x.dtype)
    h = F.linear(x, dense.T if fan_in_fan_out else dense, bias)
    inputs = x.to(lora_A.dtype)
    if mask is not None:
        inputs = dropout_reference(inputs, mask, p)
    delta = F.linear(F.linear(inputs, lora_A), lora_B) * scaling
    return (h + delta).to(h.dtype)


class _LoraLinear(torch.autograd.Function):
    """x [..., in], weight [out, in] ([in, out] with fan_in_fan_out), A [r, in], B [out, r] -> [..., out]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | FrozenWeight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        p: float,
        seed: int,
        fan_in_fan_out: bool,
    ) -> Tensor:
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # [n, in]
        u = low_rank_tokens(_dropped(rows, lora_A.dtype, p, seed), lora_A.T)  # [n, r]
        if not isinstance(weight, Tensor):
            h = weight.product(rows, bias, (u * scaling, lora_B))
        else:
            h = linear_out(rows, weight if fan_in_fan_out else weight.T, bias)
            if h.dtype == lora_B.dtype:
                add_low_rank_(h, u * scaling, lora_B.T)
            else:  # half-precision base, fp32 adapter: the sum is rounded once
                h = torch.addmm(h.to(lora_B.dtype), u, lora_B.T, alpha=scaling).to(h.dtype)
        # The stored tensors of a quantized weight are saved too, so that autograd sees when one is overwritten.
        stored = (weight,) if isinstance(weight, Tensor) else weight.tensors().values()
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, lora_A, lora_B, u, *stored)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.quantized = None if isinstance(weight, Tensor) else weight
        ctx.scaling, ctx.p, ctx.seed, ctx.fan_in_fan_out = scaling, p, seed, fan_in_fan_out
        return h if x.dim() == 2 else h.view(*x.shape[:-1], h.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, lora_A, lora_B, u, weight, *_ = ctx.saved_tensors
        quantized: FrozenWeight | None = ctx.quantized
        need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        g = grad.reshape(ctx.shape[:-1].numel(), grad.shape[-1])  # [n, out]
        g_low = g.to(lora_B.dtype)
        gu = low_rank_tokens(g_low, lora_B) * ctx.scaling  # [n, r]
        dx = dA = dB = db = None
        if need_x and quantized is not None and ctx.p == 0.0:
            dx = quantized.input_gradient(g, (gu, lora_A.T)).to(ctx.dtype).view(ctx.shape)
        elif need_x:
            if quantized is None:
                dx = linear_out(g, weight.T if ctx.fan_in_fan_out else weight, None)  # [n, in]
            else:
                dx = quantized.input_gradient(g, None)
            if ctx.p == 0.0 and dx.dtype == lora_A.dtype:
                add_low_rank_(dx, gu, lora_A)
            else:
                update = low_rank_tokens(gu, lora_A)
                dx = (plus_dropped(dx, update, ctx.p, ctx.seed) if ctx.p > 0.0 else dx + update).to(ctx.dtype)
            dx = dx.view(ctx.shape)
        if need_A:
            rows = x.reshape(g.shape[0], x.shape[-1])  # [n, in]
            dA = low_rank_gradient(gu, _dropped(rows, lora_A.dtype, ctx.p, ctx.seed))
        if need_B:
            dB = low_rank_gradient(u, g_low).T.mul(ctx.scaling).contiguous()
        if need_bias:
            db = g.sum(0)
        return dx, None, db, dA, dB, None, None, None, None


def _dropped(rows: Tensor, dtype: torch.dtype, p: float, seed: int) -> Tensor:
    """Compute dropout(rows) in the adapter's dtype; a temporary, never saved."""
    rows = rows.to(dtype)
    return rows if p == 0.0 else dropped(rows, p, seed)


def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float = 0.0,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """Compute a frozen linear layer plus its low-rank update.

    Args:
        x: [..., in], the dtype of ``weight`` (under autocast: any floating dtype).
        weight: [out, in], or [in, out] with ``fan_in_fan_out``; or a quantized weight, which is always [out, in]. It gets no
            gradient.
        bias: [out] or None.
        lora_A: [r, in], in the dtype of ``lora_B``, which may be wider than the weight's.
        lora_B: [out, r].
        scaling: s in the equation above.
        p: Dropout probability on the low-rank path; 0 when not training.
        fan_in_fan_out: ``weight`` is stored as [in, out].

    Returns:
        [..., out] in the dtype of ``weight``; of a quantized one in the dtype of ``x``.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, lora_A, lora_B = (t.to(dtype) for t in (x, lora_A, lora_B))
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return _apply(x, weight, bias, lora_A, lora_B, scaling, p, fan_in_fan_out)
    return _apply(x, weight, bias, lora_A, lora_B, scaling, p, fan_in_fan_out)


def _apply(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    p: float,
    fan_in_fan_out: bool,
) -> Tensor:
    seed = draw_seed() if p > 0.0 else 0
    return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, p, seed, fan_in_fan_out)
