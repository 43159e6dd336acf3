"""Matrix products in C: an int8 or NF4 weight by few tokens (GEMV) or many (GEMM), and an fp32 weight by many.

Names follow the number formats: ``w8`` an int8 weight, ``a16`` and ``a8`` activations rounded to int16 or int8, ``dgrad`` the
gradient to the input. Callers check shapes and memory first, with :mod:`lorakeet.kernels.cpu.bindings`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lorakeet.kernels.cpu.abi import GROUP, MAX_FUSED_RANK
from lorakeet.kernels.cpu.bindings import is_cpu_contiguous, pointer
from lorakeet.kernels.cpu.build import library
from lorakeet.kernels.cpu.features import Feature, has
from lorakeet.kernels.cpu.memory import transient_empty, workspace

#: Tokens. At or below this, the product is bound by reading the weight, on every back end.
GEMV_TOKENS = 16
#: Low-rank factors u [n, r] and v [out, r] of a product u·vᵀ.
LowRank = tuple[Tensor, Tensor]


def gemv_w8(x: Tensor, weight: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute h = (x·diag(c))·W₈ᵀ·diag(s) + b for few tokens; the weight is read once.

    Args:
        x: fp32 [n, in].
        weight: W₈, int8 [out, in].
        row_scale: s, fp32 [out].
        column_scale: c, fp32 [in], or None.
        bias: b, fp32 [out], or None.

    Returns:
        fp32 [n, out].
    """
    (n, width), out = x.shape, weight.shape[0]
    h = x.new_empty(n, out)
    addresses = pointer(x), pointer(weight), pointer(row_scale), pointer(column_scale), pointer(bias), pointer(h)
    library().lk_gemv_w8(*addresses, n, out, width)
    return h


def can_fuse_low_rank(u: Tensor, v: Tensor) -> bool:
    """Whether :func:`gemm_w8a16` can add u·vᵀ: u [n, r] and v [out, r] fp32, r at most :data:`MAX_FUSED_RANK`."""
    return u.dtype == v.dtype == torch.float32 and 0 < u.shape[1] <= MAX_FUSED_RANK and is_cpu_contiguous(u)


def gemm_w8a16(
    x: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    low_rank: LowRank | None = None,
    tiles: bool = False,
) -> Tensor:
    """Compute h = (x·diag(c))·W₈ᵀ·diag(s) + b + u·vᵀ, with x rounded to int16 by rows.

    Args:
        x: fp32 [n, in].
        weight: W₈, int8 [out, in].
        row_scale: s, fp32 [out].
        column_scale: c, fp32 [in], or None.
        bias: b, fp32 [out], or None.
        low_rank: u [n, r] and v [out, r] of which :func:`can_fuse_low_rank` is true, or None.
        tiles: Multiply in tiles of AMX; the result is the same, to the bit.

    Returns:
        fp32 [n, out].
    """
    strips, activation_scale = pack_a16(x, column_scale, tiles=tiles)
    h = transient_empty(x, x.shape[0], weight.shape[0])
    u, v = (None, None) if low_rank is None else (low_rank[0], low_rank[1].T.contiguous())
    tensors = strips, activation_scale, weight, row_scale, bias, u, v
    rank = 0 if u is None else u.shape[1]
    given = *map(pointer, tensors), rank, pointer(h), x.shape[0], *weight.shape
    if tiles:
        library().lk_gemm_w8a16_amx(*given)
    else:
        library().lk_gemm_w8a16(*given, 0)
    return h


def gemv_w8a16(
    x: Tensor, weight: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Compute what :func:`gemm_w8a16` computes, to the bit, fast for few tokens; the weight is read once.

    Args:
        x: fp32 [n, in].
        weight: W₈, int8 [out, in].
        row_scale: s, fp32 [out].
        column_scale: c, fp32 [in], or None.
        bias: b, fp32 [out], or None.

    Returns:
        fp32 [n, out].
    """
    (n, width), out = x.shape, weight.shape[0]
    h, memory = x.new_empty(n, out), workspace(library().lk_packed_a16_rows(n, width), torch.int8)
    tensors = x, weight, row_scale, column_scale, bias, h, memory
    library().lk_gemv_w8a16(*map(pointer, tensors), n, out, width)
    return h


def gemm_w8a16_dgrad(
    g: Tensor, weight: Tensor, row_scale: Tensor, column_scale: Tensor | None, error_feedback: bool = False
) -> Tensor:
    """Compute ∂x = (g·diag(s))·W₈·diag(c), with g·diag(s) rounded to int16 by rows.

    Args:
        g: fp32 [n, out].
        weight: W₈, int8 [out, in].
        row_scale: s, fp32 [out].
        column_scale: c, fp32 [in], or None.
        error_feedback: Add the rounding error of a value to a later one, so that sums over a row keep their value.

    Returns:
        fp32 [n, in].
    """
    strips, gradient_scale = pack_a16(g, row_scale, error_feedback)
    dx = transient_empty(g, g.shape[0], weight.shape[1])
    tensors = strips, gradient_scale, weight, column_scale, None, None, None
    library().lk_gemm_w8a16(*map(pointer, tensors), 0, pointer(dx), g.shape[0], *weight.shape, 1)
    return dx


def pack_a16(
    x: Tensor, factor: Tensor | None, error_feedback: bool = False, tiles: bool = False
) -> tuple[Tensor, Tensor]:
    """Round x·diag(factor) to int16, packed in strips.

    Args:
        x: fp32 [n, k].
        factor: fp32 [k], or None.
        error_feedback: As for :func:`gemm_w8a16_dgrad`.
        tiles: Pack in tiles of AMX: the high and the low bytes apart.

    Returns:
        The strips, in this thread's workspace: valid until the next packing. The scale of each row, fp32 [n].
    """
    scale = x.new_empty(x.shape[0])
    if tiles:
        strips, pack = workspace(library().lk_packed_a16_amx_size(*x.shape), torch.int8), library().lk_pack_a16_amx
    else:
        strips, pack = workspace(library().lk_packed_a16_size(*x.shape), torch.int16), library().lk_pack_a16
    pack(pointer(x), pointer(factor), pointer(strips), pointer(scale), *x.shape, error_feedback)
    return strips, scale


def gemm_w8a8_grouped_dgrad(
    g: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    error_feedback: bool = False,
    tiles: bool = False,
) -> Tensor:
    """Compute ∂x = (g·diag(s))·W₈·diag(c), with g·diag(s) rounded to int8 by groups of :data:`GROUP` columns.

    Args:
        g: fp32 [n, out].
        weight: W₈, int8 [out, in].
        row_scale: s, fp32 [out].
        column_scale: c, fp32 [in], or None.
        error_feedback: As for :func:`gemm_w8a16_dgrad`.
        tiles: Multiply in tiles of AMX; the result is the same, to the bit.

    Returns:
        fp32 [n, in].
    """
    packed = pack_a8_grouped(g, row_scale, error_feedback, tiles)
    dx = transient_empty(g, g.shape[0], weight.shape[1])
    multiply = library().lk_gemm_w8a8_amx_dgrad if tiles else library().lk_gemm_w8a8_grouped_dgrad
    multiply(*map(pointer, (*packed, weight, column_scale, dx)), g.shape[0], *weight.shape)
    return dx


def pack_a8_grouped(x: Tensor, factor: Tensor, error_feedback: bool = False, tiles: bool = False) -> tuple[Tensor, ...]:
    """Round x·diag(factor) to int8 by groups, packed in strips.

    Args:
        x: fp32 [n, k].
        factor: fp32 [k].
        error_feedback: As for :func:`gemm_w8a16_dgrad`.
        tiles: Pack in tiles of AMX.

    Returns:
        Codes, scales and, without ``tiles``, starts of the sums, in this thread's workspace: valid until the next packing.
    """
    groups = library().lk_packed_a8_amx_groups(*x.shape) if tiles else library().lk_packed_a8_groups(*x.shape)
    size = GROUP * groups
    memory = workspace(size + 8 * groups, torch.int8)
    codes, scale, start = memory[:size], memory[size : size + 4 * groups], memory[size + 4 * groups :]
    packed = (codes, scale) if tiles else (codes, scale, start)
    pack = library().lk_pack_a8_amx if tiles else library().lk_pack_a8_grouped
    pack(*map(pointer, (x, factor, *packed)), *x.shape, error_feedback)
    return packed


def outlier_dgrad(g: Tensor, positions: Tensor, values: Tensor, dx: Tensor) -> Tensor:
    """Write g·valuesᵀ into the columns ``positions`` of dx, and return dx.

    Args:
        g: fp32 [n, out].
        positions: Column numbers, fp32 [outliers].
        values: The outlier columns of the weight, fp32 [outliers, out].
        dx: fp32 [n, in].
    """
    tensors = g, values, positions, dx
    library().lk_outlier_dgrad(*map(pointer, tensors), *g.shape, dx.shape[1], len(positions))
    return dx


@cache
def has_fast_f32() -> bool:
    """Whether :func:`gemm_f32` is faster than torch's own product on this processor."""
    return has(Feature.AVX2) and has(Feature.AMD)


def gemm_f32(
    x: Tensor, m: Tensor, bias: Tensor | None = None, low_rank: bool = False, add_to: Tensor | None = None
) -> Tensor:
    """Compute x·m + b. The order of each sum is fixed: it depends on shapes alone, and not on the number of threads.

    Args:
        x: fp32 [n, k], contiguous.
        m: fp32 [k, columns]; m or mᵀ is contiguous.
        bias: fp32 [columns] or None.
        low_rank: Sum in the blocks of a product with an adapter's A or B.
        add_to: fp32 [n, columns], contiguous: add the product to it, in place.

    Returns:
        fp32 [n, columns].
    """
    h = transient_empty(x, x.shape[0], m.shape[1]) if add_to is None else add_to
    strips = workspace(library().lk_packed_f32_size(x.shape[0]), torch.float32)
    tensors = x, m, bias, strips, h
    column_major = not m.is_contiguous()
    library().lk_gemm_f32(*map(pointer, tensors), *x.shape, m.shape[1], column_major, low_rank, add_to is not None)
    return h


def gemv_nf4(x: Tensor, codes: Tensor, absmax: Tensor, nested: Tensor | None, bias: Tensor | None, out: int) -> Tensor:
    """Compute h = x·Wᵀ + b for few tokens and an NF4 weight, which is read once.

    Args:
        x: fp32 [n, in]; 64 divides ``in``.
        codes: As :mod:`lorakeet.kernels.nf4.format` describes it, like the next two.
        absmax: Scales of the blocks.
        nested: Scales of the scales, or None.
        bias: b, fp32 [out], or None.
        out: Output channels.

    Returns:
        fp32 [n, out].
    """
    n, width = x.shape
    h = x.new_empty(n, out)
    tensors = x, codes, absmax, nested, bias, h
    library().lk_gemv_nf4(*map(pointer, tensors), n, out, width)
    return h


def gemm_nf4(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
    dgrad: bool = False,
) -> Tensor:
    """Compute h = x·Wᵀ + b for an NF4 weight, or the gradient x·W; the order of each sum is fixed, as for :func:`gemm_f32`.

    Args:
        x: fp32 [n, in]; with ``dgrad`` [n, out].
        codes: As :mod:`lorakeet.kernels.nf4.format` describes it, like the next two.
        absmax: Scales of the blocks.
        nested: Scales of the scales, or None.
        bias: b, fp32 [out], or None.
        shape: (out, in); 64 divides ``in``.
        dgrad: Compute the gradient to the input.

    Returns:
        fp32 [n, out]; with ``dgrad`` [n, in].
    """
    h = transient_empty(x, x.shape[0], shape[1] if dgrad else shape[0])
    strips = workspace(library().lk_packed_f32_size(x.shape[0]), torch.float32)
    tensors = x, codes, absmax, nested, bias, strips, h
    library().lk_gemm_nf4(*map(pointer, tensors), x.shape[0], *shape, dgrad)
    return h
