"""Rotary position embedding in one or two passes over memory (Su et al. 2021, arXiv:2104.09864).

    y = x∘cos + R(x)∘sin,   R(x₁, x₂) = (-x₂, x₁)          ∂x = ∂y∘cos - R(∂y∘sin)

x₁ and x₂ are the halves of a head. In plain torch they are copied, negated, joined, multiplied and added, forward and
backward; here the products are added to y in place, which moves half as many bytes and rounds less often. Nothing but cos
and sin is kept for the backward pass, nor does autograd keep more. On a CPU in fp32, one row of samples at a time, it is one
pass (``elementwise.c``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The slow truth: the equation in plain torch, differentiated by autograd."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: float) -> Tensor:
    """x∘cos - s·(x₂∘first), x∘cos + s·(x₁∘second), side by side; as x lies in memory."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], first, value=-sign)
    y[..., half:].addcmul_(x[..., :half], second, value=sign)
    return y


def _in_loops(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor | None:
    """The compiled loops' result, for heads that lie beside each other for each position, one row of angles for all of
    them; else None."""
    if x.dim() != 4 or x.shape[0] != 1 or any(t.shape != (1, 1, *x.shape[2:]) for t in (cos, sin)):
        return None
    rows, cos, sin = x[0].transpose(0, 1), cos[0, 0], sin[0, 0]  # [T, heads, d] and [T, d]
    if not bindings.supports(rows, cos, sin):
        return None
    return bindings.rotary(rows, cos, sin, backward).transpose(0, 1)[None]


class _Rotary(torch.autograd.Function):
    """x [..., d], cos and sin [..., d] that broadcast -> [..., d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        made = _in_loops(x, cos, sin, backward=False)
        first, second = sin.chunk(2, dim=-1)
        return _turned(x, cos, first, second, sign=1.0) if made is None else made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        made = _in_loops(grad, cos, sin, backward=True)
        second, first = sin.chunk(2, dim=-1)
        return _turned(grad, cos, first, second, sign=-1.0) if made is None else made, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` turned by the angles of its position.

    Args:
        x: [..., d], d even.
        cos, sin: [..., d] that broadcast to ``x`` and get no gradient; of another width than x, or learned, the reference
            is what runs.

    Returns:
        [..., d], the widest of the dtypes.
    """
    plain = all(t.shape[-1] == x.shape[-1] and not t.requires_grad for t in (cos, sin))
    if not plain or x.shape[-1] % 2:
        return rotary_reference(x, cos, sin)
    turned: Tensor = _Rotary.apply(x, cos, sin)
    return turned
