"""A frozen linear layer whose weight is stored in four bits.

    h  = x·Wᵀ + b + u·vᵀ          ∂x = g·W + u·vᵀ

The weight is never whole in memory in a wider format: a part of it that fits into the processor's cache is dequantized and
multiplied there. Nothing is rounded but the weight.

- In C, for fp32 on a CPU, where 64 divides the input channels. Many tokens: a panel at a time is looked up in registers
  and multiplied by the tiles of the fp32 product (``gemm_nf4.c``, AVX2). Few tokens: the codes are multiplied as they
  are read (``gemv_nf4.c``).
- In Triton on NVIDIA GPUs (:mod:`lorakeet.kernels.nf4.triton`).
- In plain torch elsewhere, some output channels at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings, features, gemm
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.gemm import GEMV_TOKENS, LowRank
from lorakeet.kernels.cpu.memory import transient_empty
from lorakeet.kernels.cpu.ordered_product import add_low_rank_
from lorakeet.kernels.nf4.format import Nf4Tensors, block_scales, dequantize, is_readable

#: Values of the weight that plain torch dequantizes at a time: 1 MB in fp32.
PART = 1 << 18


def product(x: Tensor, weight: Nf4Tensors, bias: Tensor | None = None, low_rank: LowRank | None = None) -> Tensor:
    """Compute h = x·Wᵀ + b + u·vᵀ without autograd.

    Args:
        x: [n, in], any floating dtype.
        weight: [out, in] in four bits.
        bias: b [out] or None.
        low_rank: u [n, r] and v [out, r], or None.

    Returns:
        [n, out] in x's dtype.
    """
    if _is_readable(x, weight, bias, weight.shape[1]):
        codes, absmax, nested, shape = weight
        if x.shape[0] <= GEMV_TOKENS or not features.has(Feature.AVX2):
            h = gemm.gemv_nf4(x, codes, absmax, nested, bias, shape[0])
        else:
            h = gemm.gemm_nf4(x, codes, absmax, nested, bias, shape)
    elif x.is_cuda and (gpu := _gpu()).supports(x, weight, weight.shape[1]):
        h = gpu.product(x, weight, bias)
    else:
        h = transient_empty(x, len(x), weight.shape[0])
        for rows, part in _parts(weight, x.dtype):
            torch.mm(x, part.T, out=h[:, rows])
        h = h if bias is None else h.add_(bias)
    return h if low_rank is None else _add_low_rank(h, low_rank)


def input_gradient(g: Tensor, weight: Nf4Tensors, low_rank: LowRank | None = None) -> Tensor:
    """Compute ∂x = g·W + u·vᵀ without autograd.

    Args:
        g: [n, out], any floating dtype.
        weight: [out, in] in four bits.
        low_rank: u [n, r] and v [in, r], or None.

    Returns:
        [n, in] in g's dtype.
    """
    if _is_readable(g, weight, None, weight.shape[0]) and features.has(Feature.AVX2):
        codes, absmax, nested, shape = weight
        dx = gemm.gemm_nf4(g, codes, absmax, nested, None, shape, dgrad=True)
    elif g.is_cuda and (gpu := _gpu()).supports(g, weight, weight.shape[0]):
        dx = gpu.input_gradient(g, weight)
    else:
        dx = g.new_zeros(len(g), weight.shape[1])
        for rows, part in _parts(weight, g.dtype):
            dx.addmm_(g[:, rows], part)
    return dx if low_rank is None else _add_low_rank(dx, low_rank)


def _gpu() -> Any:
    """Return the module of the GPU's products, which imports Triton."""
    from lorakeet.kernels.nf4 import triton

    return triton


def _is_readable(x: Tensor, weight: Nf4Tensors, bias: Tensor | None, width: int) -> bool:
    """Whether C can read these: fp32 rows of ``width`` values, and tensors of the sizes that belong to the shape."""
    if x.dtype != torch.float32 or x.shape[1] != width or not x.numel():
        return False
    tensors = [t for t in (x, *weight[:3], bias) if t is not None]
    fits = is_readable(weight) and bindings.is_fp32_vector(weight.shape[0], bias)
    return fits and bindings.is_cpu_contiguous(*tensors)


def _parts(weight: Nf4Tensors, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of output channels, each of about :data:`PART` values, with their values."""
    out, inner = weight.shape
    size, scales = max(PART // max(inner, 1), 1), block_scales(weight)
    for at in range(0, out, size):
        rows = slice(at, min(at + size, out))
        yield rows, dequantize(weight, dtype, rows, scales)


def _add_low_rank(h: Tensor, low_rank: LowRank) -> Tensor:
    """Return h + u·vᵀ: in place where the dtypes allow it, else rounded once."""
    u, v = low_rank
    if h.dtype == v.dtype:
        return add_low_rank_(h, u, v.T)
    return torch.addmm(h.to(v.dtype), u, v.T).to(h.dtype)


class _Nf4Linear(torch.autograd.Function):
    """x [..., in] -> [..., out]; only the stored tensors of the weight are saved for backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        absmax: Tensor,
        nested: Tensor | None,
        shape: tuple[int, int],
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, absmax, nested)
        ctx.shape = shape
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        h = product(rows, Nf4Tensors(codes, absmax, nested, shape), bias)
        return h if x.dim() == 2 else h.view(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            codes, absmax, nested = ctx.saved_tensors
            weight = Nf4Tensors(codes, absmax, nested, ctx.shape)
            dx = input_gradient(g, weight).view(*grad.shape[:-1], ctx.shape[1])
        return dx, None, None, None, None, g.sum(0) if ctx.needs_input_grad[5] else None


def nf4_linear(x: Tensor, weight: Nf4Tensors, bias: Tensor | None = None) -> Tensor:
    """Apply a frozen linear layer in four bits.

    Args:
        x: [..., in], any floating dtype; under autocast it is cast to autocast's dtype.
        weight: [out, in] in four bits; gets no gradient.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    bias = None if bias is None else bias.to(x.dtype)
    if not torch.is_grad_enabled():
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        made = product(rows, weight, bias)  # of a view the loss makes a copy
        return made if x.dim() == 2 else made.view(*x.shape[:-1], weight.shape[0])
    h: Tensor = _Nf4Linear.apply(x, *weight, bias)
    return h
