"""Rotary position embedding in one or two passes over memory (Su et al. 2021, arXiv:2104.09864).

    y = x∘cos + R(x)∘sin,   R(x₁, x₂) = (-x₂, x₁)          ∂x = ∂y∘cos - R(∂y∘sin)

x₁ and x₂ are the halves of a head. Plain torch copies, negates, concatenates, multiplies and adds them. Here the products
are added to y in place, which moves half as many bytes and rounds less often. Only cos and sin are saved for the backward
pass, as in autograd. On a CPU in fp32, for one packed row of samples, it is one pass over memory (``elementwise.c``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute the reference: the equation in plain torch, differentiated by autograd."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rotate(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: float) -> Tensor:
    """Compute x₁∘cos - s·(x₂∘first) and x₂∘cos + s·(x₁∘second), concatenated, in x's memory layout; s is ``sign``."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], first, value=-sign)
    y[..., half:].addcmul_(x[..., :half], second, value=sign)
    return y


def _compiled(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor | None:
    """Rotate by the compiled kernel: one row [1, heads, T, d] with the heads of a position adjacent, one set of angles.

    Args:
        x: [1, heads, T, d].
        cos: [1, 1, T, d].
        sin: [1, 1, T, d].
        backward: Compute the gradient instead.

    Returns:
        [1, heads, T, d]; None where the kernel does not support these tensors.
    """
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
        made = _compiled(x, cos, sin, backward=False)
        first, second = sin.chunk(2, dim=-1)
        return _rotate(x, cos, first, second, sign=1.0) if made is None else made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        made = _compiled(grad, cos, sin, backward=True)
        second, first = sin.chunk(2, dim=-1)
        return _rotate(grad, cos, first, second, sign=-1.0) if made is None else made, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` by the angles of its positions.

    Args:
        x: [..., d], d even.
        cos: [..., d], broadcasts to ``x`` and gets no gradient; if its width differs or it is trainable, the reference runs.
        sin: Likewise.

    Returns:
        [..., d], the widest of the dtypes.
    """
    plain = all(t.shape[-1] == x.shape[-1] and not t.requires_grad for t in (cos, sin))
    if not plain or x.shape[-1] % 2:
        return rotary_reference(x, cos, sin)
    rotated: Tensor = _Rotary.apply(x, cos, sin)
    return rotated
