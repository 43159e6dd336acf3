"""A frozen linear layer on a CPU that leaves no holes in memory when its results are given back
(:mod:`lorakeet.kernels.cpu.memory`).

h = x·Wᵀ + b          ∂x = g·W

Torch multiplies by Intel's library on x86, which reaches about two thirds of what AMD's processors can do; there the product
is that of ``gemm_f32.c``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.cpu.memory import passing

#: Of so few tokens a product waits for the weight, whoever multiplies.
FEW = 16


def frozen_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The slow truth: plain torch, differentiated by autograd."""
    return F.linear(x, weight, bias)


def _plain(*tensors: Tensor) -> bool:
    """Whether tensors are what they seem: none that others trace, distribute or batch."""
    return all(type(t) in bindings.PLAIN for t in tensors) and not torch.compiler.is_compiling()


def linear_out(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows·weight + bias for rows [n, in], weight [in, out] and bias [out] of one dtype, without a gradient."""
    if not (rows.is_cpu and _plain(rows, weight)):
        return F.linear(rows, weight.T, bias)
    if bindings.has_fp32() and _tiles_take(rows, weight, bias):
        return bindings.fp32_product(rows, weight, bias)
    h = passing(rows, rows.shape[0], weight.shape[1])
    return torch.mm(rows, weight, out=h) if bias is None else torch.addmm(bias, rows, weight, out=h)


def _tiles_take(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled tiles can multiply these: many tokens in fp32, shapes that fit, and memory as they read it."""
    depth, columns = weight.shape
    if rows.shape[0] <= FEW or rows.shape[1] != depth or not weight.numel():
        return False
    side = weight if weight.is_contiguous() else weight.T
    given = (rows, side) if bias is None else (rows, side, bias)
    return weight.dtype == torch.float32 and bindings.takes(*given) and bindings.fit(columns, bias)


class _FrozenLinear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None -> [..., out]; the weight alone is remembered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        h = linear_out(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight.T, bias)
        return h.resize_(*x.shape[:-1], len(weight))  # no view: what is one may not be overwritten

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        dx = linear_out(grad.reshape(grad.shape[:-1].numel(), len(weight)), weight, None)
        return dx.resize_(*grad.shape[:-1], weight.shape[1]), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose weight and bias get no gradient.

    Args:
        x: [..., in].
        weight: [out, in]; of another dtype or device than x, learned, or under autocast, plain torch is what runs.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    given = [t for t in (x, weight, bias) if t is not None]
    ours = all(t.is_cpu and t.dtype == x.dtype for t in given) and not any(t.requires_grad for t in given[1:])
    if not ours or torch.is_autocast_enabled("cpu") or not _plain(*given):
        return frozen_linear_reference(x, weight, bias)
    h: Tensor = _FrozenLinear.apply(x, weight, bias)
    return h
