"""The Triton kernels of :mod:`lorakeet.kernels.nf4.triton`; importing this file needs Triton, and no GPU.

Two values share a byte. So columns at even and at odd places are multiplied apart, and nothing is interleaved.
"""
# mypy: ignore-errors
# Triton has no types of its own and reads those of a kernel as its instructions.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def _scales(absmax, nested, block, mask):
    """Return the fp32 scales of blocks: stored, or codes of ``nested`` (mean, 256 values, scales of 256 scales)."""
    if nested is None:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    else:
        code = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested + 1 + code) * tl.load(nested + 257 + block // 256, mask=mask, other=0.0) + tl.load(
            nested
        )
    return scale


@triton.jit(do_not_specialize=["n"])
def multiply(
    x, codes, absmax, nested, table, bias, out, n, width, inner, x_row, x_column,
    BLOCK_M: constexpr, BLOCK_N: constexpr, KIND: constexpr,
):  # fmt: skip
    """Compute out [n, width] = x·Wᵀ + bias.

    Args:
        x: [n, inner], with its strides x_row and x_column.
        codes, absmax, nested: W [width, inner] in NF4; 64 divides ``inner``.
        table: The sixteen values.
        bias: [width] or None.
        BLOCK_M, BLOCK_N: Sizes of a tile.
        KIND: Dtype that the products are computed in.
    """
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.arange(0, 32)
    begin = c.to(tl.int64) * inner
    x += r[:, None].to(tl.int64) * x_row + 2 * pair[None, :] * x_column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, inner, 64):
        byte = tl.load(codes + (begin[None, :] + at) // 2 + pair[:, None], mask=c[None, :] < width, other=0).to(
            tl.int32
        )
        scale = _scales(absmax, nested, (begin + at) // 64, c < width)[None, :]
        even = tl.load(x + at * x_column, mask=r[:, None] < n, other=0.0).to(KIND)
        odd = tl.load(x + (at + 1) * x_column, mask=r[:, None] < n, other=0.0).to(KIND)
        total = tl.dot(even, (tl.load(table + (byte >> 4)) * scale).to(KIND), total, input_precision="tf32x3")
        total = tl.dot(odd, (tl.load(table + (byte & 15)) * scale).to(KIND), total, input_precision="tf32x3")
    if bias is not None:
        total += tl.load(bias + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
    out += r[:, None].to(tl.int64) * width + c[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=(r[:, None] < n) & (c[None, :] < width))


@triton.jit(do_not_specialize=["n"])
def multiply_back(
    g, codes, absmax, nested, table, out, n, width, inner, g_row, g_column,
    BLOCK_M: constexpr, BLOCK_K: constexpr, KIND: constexpr,
):  # fmt: skip
    """Compute out [n, inner] = g·W; a program has 64 columns, which share the scale of a row of W.

    Args:
        g: [n, width], with its strides g_row and g_column.
        codes, absmax, nested: W [width, inner] in NF4; 64 divides ``inner``.
        table: The sixteen values.
        BLOCK_M, BLOCK_K: Sizes of a tile.
        KIND: Dtype that the products are computed in.
    """
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.program_id(1) * 64
    pair = tl.arange(0, 32)
    k = tl.arange(0, BLOCK_K)
    even = tl.zeros((BLOCK_M, 32), tl.float32)
    odd = tl.zeros((BLOCK_M, 32), tl.float32)
    for first in range(0, width, BLOCK_K):
        row = first + k
        begin = row.to(tl.int64) * inner + at
        byte = tl.load(codes + begin[:, None] // 2 + pair[None, :], mask=row[:, None] < width, other=0).to(tl.int32)
        scale = _scales(absmax, nested, begin // 64, row < width)[:, None]
        here = r[:, None].to(tl.int64) * g_row + row[None, :].to(tl.int64) * g_column
        left = tl.load(g + here, mask=(r[:, None] < n) & (row[None, :] < width), other=0.0).to(KIND)
        even = tl.dot(left, (tl.load(table + (byte >> 4)) * scale).to(KIND), even, input_precision="tf32x3")
        odd = tl.dot(left, (tl.load(table + (byte & 15)) * scale).to(KIND), odd, input_precision="tf32x3")
    out += r[:, None].to(tl.int64) * inner + at + 2 * pair[None, :]
    tl.store(out, even.to(out.dtype.element_ty), mask=r[:, None] < n)
    tl.store(out + 1, odd.to(out.dtype.element_ty), mask=r[:, None] < n)


INTERPRETED = not isinstance(multiply, triton.JITFunction)
