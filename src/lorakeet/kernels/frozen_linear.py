"""A frozen linear layer on a CPU whose results do not fragment the heap (:mod:`lorakeet.kernels.cpu.memory`).

    h = x·Wᵀ + b          ∂x = g·W

On x86 torch multiplies with Intel's MKL, which reaches about two thirds of the peak of AMD's processors. There the product is
that of ``gemm_f32.c``. It is on other processors too where the order of sums is fixed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels import fixed_order
from lorakeet.kernels.cpu import bindings, features, gemm
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.memory import transient_empty


def frozen_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the reference: plain torch, differentiated by autograd."""
    return F.linear(x, weight, bias)


def _plain(*tensors: Tensor) -> bool:
    """Whether tensors are of a plain type, and nothing traces, distributes or batches them."""
    return all(type(t) in bindings.PLAIN for t in tensors) and not torch.compiler.is_compiling()


def linear_out(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute rows·weight + bias without autograd, for rows [n, in], weight [in, out] and bias [out] of one dtype."""
    if not (rows.is_cpu and _plain(rows, weight)):
        return F.linear(rows, weight.T, bias)
    if (gemm.has_fast_f32() or fixed_order.is_active()) and _tiles_support(rows, weight, bias):
        return gemm.gemm_f32(rows, weight, bias)
    h = transient_empty(rows, rows.shape[0], weight.shape[1])
    return torch.mm(rows, weight, out=h) if bias is None else torch.addmm(bias, rows, weight, out=h)


def _tiles_support(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``gemm_f32.c`` can multiply these: many fp32 tokens, shapes that fit, contiguous memory."""
    depth, columns = weight.shape
    few = rows.shape[0] <= gemm.GEMV_TOKENS
    if few or rows.shape[1] != depth or not weight.numel() or not features.has(Feature.AVX2):
        return False
    side = weight if weight.is_contiguous() else weight.T
    tensors = (rows, side) if bias is None else (rows, side, bias)
    return weight.dtype == torch.float32 and bindings.supports(*tensors) and bindings.is_fp32_vector(columns, bias)


class _FrozenLinear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None -> [..., out]; only the weight is saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        h = linear_out(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight.T, bias)
        return h.resize_(*x.shape[:-1], len(weight))  # not a view: a view may not be overwritten

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        dx = linear_out(grad.reshape(grad.shape[:-1].numel(), len(weight)), weight, None)
        return dx.resize_(*grad.shape[:-1], weight.shape[1]), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer whose weight and bias get no gradient.

    Args:
        x: [..., in].
        weight: [out, in]. Plain torch computes if it requires a gradient, has another dtype or device than x, or under
            autocast.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    tensors = [t for t in (x, weight, bias) if t is not None]
    alike = all(t.is_cpu and t.dtype == x.dtype for t in tensors)
    frozen = not any(t.requires_grad for t in tensors[1:])
    if not (alike and frozen) or torch.is_autocast_enabled("cpu") or not _plain(*tensors):
        return frozen_linear_reference(x, weight, bias)
    h: Tensor = _FrozenLinear.apply(x, weight, bias)
    return h
