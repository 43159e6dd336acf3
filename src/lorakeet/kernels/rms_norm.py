"""Root-mean-square normalization that saves its input and one number a row (Zhang & Sennrich 2019, arXiv:1910.07467).

    x̂ = s·x,   s = (mean(x²) + ε)^(-½)          y = w·x̂,   or (1 + w)·x̂ with ``one_more`` (Gemma)

    ∂x = s·(t - x̂·mean(t·x̂)),   t = w·∂y        ∂w = Σ_rows ∂y·x̂

Computed in fp32 or wider, for any dtype of x. Saved for backward: x in its own dtype, and s. Autograd also saves an fp32 copy
of a half-precision x, and x̂ where the weight is trainable; here both are recomputed. On a CPU in fp32 each direction is one
pass over memory (``elementwise.c``); elsewhere temporaries are reused in place.

Models in half precision round in two ways: x̂ is rounded to the dtype of x and then multiplied by w (Llama), or multiplied
and then rounded (Gemma).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, one_more: bool = False) -> Tensor:
    """Compute the reference: the equation in plain torch, differentiated by autograd.

    Args:
        x: [..., d].
        weight: [d].
        eps: ε above.
        one_more: Multiply by 1 + weight.

    Returns:
        [..., d].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normal = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    if one_more:
        return (normal * (1 + weight.to(wide))).to(x.dtype)
    return weight * normal.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x [..., d], weight [d] -> [..., d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, one_more: bool) -> Tensor:  # type: ignore[override]
        ctx.one_more = one_more
        if bindings.supports(x, weight) and bindings.is_fp32_vector(x.shape[-1], weight):
            y, s = bindings.rms_norm(x, weight, eps, float(one_more))
            ctx.save_for_backward(x, weight, s)
            return y
        wide = torch.promote_types(x.dtype, torch.float32)
        s = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # [..., 1]
        s.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y = x * s  # [..., d], the wider dtype
        if one_more:
            y = y.mul_(1 + weight.to(wide)).to(x.dtype)
        else:
            y = y.to(x.dtype)
            y = y.mul_(weight) if weight.dtype == y.dtype else y * weight
        ctx.save_for_backward(x, weight, s)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, s = ctx.saved_tensors
        if (
            not ctx.needs_input_grad[1]
            and bindings.supports(grad, x, weight, s)
            and bindings.is_fp32_vector(x.shape[-1], weight)
        ):
            return bindings.rms_norm_backward(grad, x, weight, s, float(ctx.one_more)), None, None, None
        grad, values = grad.to(s.dtype), x.to(s.dtype)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (grad * values).mul_(s).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            w = weight.to(s.dtype)
            t = grad * (1 + w if ctx.one_more else w)
            along = (t * values).sum(-1, keepdim=True)  # Σ t·x, so that s³·along/d = s²·mean(t·x̂)
            dx = t.mul_(s).addcmul_(values, along.mul_(s.pow(3)).div_(-x.shape[-1])).to(x.dtype)
        return dx, dw, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_more: bool = False) -> Tensor:
    """Divide each row of ``x`` by its root mean square, and multiply by the weight.

    Args:
        x: [..., d], any floating dtype.
        weight: [d]; gets a gradient if it requires one.
        eps: ε above.
        one_more: Multiply by 1 + weight, and round the product once.

    Returns:
        [..., d] in the dtype of ``x``; without ``one_more`` in that of the weight, where it is wider.
    """
    normal: Tensor = _RMSNorm.apply(x, weight, eps, one_more)
    return normal
