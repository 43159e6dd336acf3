"""The back end ``blocked``, for every device: a few rows of W₈ at a time become x's dtype, which holds every int8 exactly.

A block is small enough to stay in the processor's cache. The scales multiply the result, or g before the product. So
nothing is rounded but the weight. A few tokens in fp32 are multiplied in C, by the bytes as they are read (``gemv_w8.c``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings, features, gemm
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.gemm import GEMV_TOKENS, LowRank
from lorakeet.kernels.cpu.memory import transient_empty
from lorakeet.kernels.int8.format import outlier_columns, split_scale

#: Values of the weight that are widened at a time: 1 MB in fp32.
BLOCK = 1 << 18
#: Output channels. A block has a multiple of this, and at least twice as many, for the tiles of matrix products.
TILE = 128


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, low_rank: LowRank | None) -> Tensor:
    """Compute h as :class:`lorakeet.kernels.int8.registry.Implementation` states it.

    Args:
        x: [n, in].
        weight: int8 [out, in].
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
        bias: [out] or None.
        low_rank: u [n, r] and v [out, r], or None.
    """
    row_scale, column_scale = split_scale(weight, scale)
    h = multiply(x, weight, row_scale, column_scale, bias)
    low_rank = with_outliers(x, weight, scale, low_rank)
    return h if low_rank is None else add_low_rank(h, low_rank)


def multiply(x: Tensor, weight: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute (x·diag(c))·W₈ᵀ·diag(s) + b.

    Args:
        x: [n, in].
        weight: int8 [out, in].
        row_scale: s [out].
        column_scale: c [in] or None.
        bias: b [out] or None.

    Returns:
        [n, out] in x's dtype.
    """
    few = x.shape[0] <= GEMV_TOKENS and x.dtype == torch.float32  # len() of a tensor costs as much as a small product
    if few and x.shape[1] == weight.shape[1] and readable(x, weight, row_scale, column_scale, bias):
        return gemm.gemv_w8(x, weight, row_scale, column_scale, bias)
    if x.dtype == torch.float16:  # before the scales, sums may leave its range
        wide_bias = None if bias is None else bias.float()
        return multiply(x.float(), weight, row_scale, column_scale, wide_bias).half()
    x = scale_columns(x, column_scale)
    h = transient_empty(x, len(x), len(weight))
    for block in blocks(weight):
        torch.mm(x, weight[block].to(x.dtype).T, out=h[:, block])
    if bias is None or h.dtype != row_scale.dtype:
        return h.mul_(row_scale) if bias is None else h.mul_(row_scale).add_(bias)
    return torch.addcmul(bias, h, row_scale, out=h)


def input_gradient(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute ∂x as :class:`lorakeet.kernels.int8.registry.Implementation` states it."""
    row_scale, column_scale = split_scale(weight, scale)
    scaled = (g * row_scale).to(g.dtype)
    dx = g.new_zeros(len(g), weight.shape[1])
    for block in blocks(weight):
        dx.addmm_(scaled[:, block], weight[block].to(g.dtype))
    dx = dx if column_scale is None else dx.mul_(column_scale)
    return add_outlier_gradient(dx, g, weight, scale)


def blocks(weight: Tensor) -> list[slice]:
    """Return runs of output channels, each of about :data:`BLOCK` values."""
    size = TILE * max(2, BLOCK // (TILE * max(weight.shape[1], 1)))
    return [slice(at, min(at + size, len(weight))) for at in range(0, len(weight), size)]


# -- parts that back ends share ---------------------------------------------------------------------------------------


def readable(
    x: Tensor, weight: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None = None
) -> bool:
    """Whether the C products can read these: not empty, scales that fit the weight, contiguous memory.

    Args:
        x: fp32 [n, in], or [n, out] backward.
        weight: int8 [out, in].
        row_scale: [out].
        column_scale: [in] or None.
        bias: [out] or None.
    """
    out, inner = weight.shape
    if not (x.shape[0] and out and inner and weight.dtype == torch.int8):
        return False
    fits = bindings.is_fp32_vector(out, row_scale, bias) and bindings.is_fp32_vector(inner, column_scale)
    tensors = [t for t in (x, weight, row_scale, column_scale, bias) if t is not None]
    return fits and bindings.is_cpu_contiguous(*tensors)


def scale_columns(x: Tensor, column_scale: Tensor | None) -> Tensor:
    """Return x·diag(c) in x's dtype; exact, as c are powers of two."""
    return x if column_scale is None else x * column_scale.to(x.dtype)


def with_outliers(x: Tensor, weight: Tensor, scale: Tensor, low_rank: LowRank | None) -> LowRank | None:
    """Append the outlier columns to a low-rank product: their x as columns of u, their values as columns of v.

    Args:
        x: [n, in].
        weight: int8 [out, in].
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
        low_rank: u [n, r] and v [out, r], or None.
    """
    outliers = outlier_columns(weight, scale)
    if outliers is None:
        return low_rank
    positions, values = outliers
    u, v = x.index_select(1, positions.long()).to(values.dtype), values.T
    return (u, v) if low_rank is None else (torch.cat((low_rank[0], u), 1), torch.cat((low_rank[1], v), 1))


def add_low_rank(h: Tensor, low_rank: LowRank) -> Tensor:
    """Return h + u·vᵀ: in place where the dtypes allow it, else rounded once."""
    u, v = low_rank
    if h.dtype == v.dtype:
        return h.addmm_(u, v.T)
    return torch.addmm(h.to(v.dtype), u, v.T).to(h.dtype)


def add_outlier_gradient(dx: Tensor, g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Write the gradient of the outlier columns into dx, and return dx.

    Args:
        dx: [n, in].
        g: [n, out].
        weight: int8 [out, in].
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
    """
    outliers = outlier_columns(weight, scale)
    if outliers is None:
        return dx
    positions, values = outliers
    if features.has(Feature.AVX2) and bindings.supports(g, dx, positions, values):
        return gemm.outlier_dgrad(g, positions, values, dx)
    return dx.index_copy_(1, positions.long(), (g.to(values.dtype) @ values.T).to(dx.dtype))
