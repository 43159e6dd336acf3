"""The Triton kernels of :mod:`lorakeet.kernels.int8.triton`; importing this file needs Triton, and no GPU.

Pointers come with their strides, in values; a pointer that is None leaves its part of a kernel out. Sizes that need not be
multiples of a block are masked; row numbers are 64 bits wide before they are multiplied by a stride.
"""
# mypy: ignore-errors
# Triton has no types of its own and reads those of a kernel as its instructions.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit(do_not_specialize=["n"])
def column_maxima(x, x_row, x_column, n, width, top, squares, ROWS: constexpr, COLUMNS: constexpr, STEPS: constexpr):
    """Compute the largest magnitude of each column, and one sum of squares for each program.

    Args:
        x: [n, width], with its strides x_row and x_column.
        top: Result int32 [width]: the bits of fp32 magnitudes, which order as the values do; zeros before the call.
        squares: Result fp32 [programs].
        ROWS, COLUMNS, STEPS: Shape of a block, and blocks of one program.
    """
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    largest = tl.zeros((COLUMNS,), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for step in range(STEPS):
        r = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = r[:, None].to(tl.int64) * x_row + c[None, :].to(tl.int64) * x_column
        v = tl.load(x + at, mask=(r[:, None] < n) & (c[None, :] < width), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(v), 0))
        total += tl.sum(v * v, 0)
    tl.atomic_max(top + c, largest.to(tl.int32, bitcast=True), mask=c < width, sem="relaxed")
    tl.store(squares + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 0))


@triton.jit(do_not_specialize=["parts"])
def choose_columns(
    top, squares, parts, numel, outlier, width, columns, inside,
    WIDTH: constexpr, PARTS: constexpr, CHUNK: constexpr, MOST: constexpr, S: constexpr,
):  # fmt: skip
    """Choose the columns above ``outlier`` × rms, the largest ones, at most MOST. One program does all.

    Args:
        top, squares: From :func:`column_maxima`; parts and numel are the sizes of squares and of x.
        outlier: Multiple of the root mean square.
        columns: Result int32 [S + 1]: the chosen numbers, 0 for each unused slot, and their count.
        inside: Result int8 [width]: 0 for an outlier, else 1.
        WIDTH, PARTS, CHUNK: Sizes of blocks.
    """
    total = tl.zeros((PARTS,), tl.float32)
    part = tl.arange(0, PARTS)
    for at in range(0, parts, PARTS):
        total += tl.load(squares + at + part, mask=at + part < parts, other=0.0)
    bits = tl.load(top + tl.arange(0, WIDTH), mask=tl.arange(0, WIDTH) < width, other=0)
    least = (outlier * tl.sqrt_rn(tl.sum(total, 0) / numel)).to(tl.int32, bitcast=True)
    if tl.sum((bits > least).to(tl.int32), 0) > MOST:
        above = 0x7F800000  # infinity; halve until `least` is the smallest bound that at most MOST columns exceed
        for _ in range(31):
            middle = least + (above - least) // 2
            many = tl.sum((bits > middle).to(tl.int32), 0) > MOST
            least = tl.where(many, middle, least)
            above = tl.where(many, above, middle)
        least = above
    count = 0
    for at in range(0, width, CHUNK):
        c = at + tl.arange(0, CHUNK)
        chosen = tl.load(top + c, mask=c < width, other=0) > least
        tl.store(columns + count + tl.cumsum(chosen.to(tl.int32), 0) - 1, c, mask=chosen)
        tl.store(inside + c, tl.where(chosen, 0, 1).to(tl.int8), mask=c < width)
        count += tl.sum(chosen.to(tl.int32), 0)
    slot = tl.arange(0, S)
    tl.store(columns + slot, tl.zeros((S,), tl.int32), mask=slot >= count)
    tl.store(columns + S, count)


@triton.jit
def _piece(x, x_row, x_column, r, c, n, width, factor, inside):
    """Load values [r, c] of x in fp32, folded with ``factor`` and without the outliers."""
    at = r[:, None] * x_row + c[None, :].to(tl.int64) * x_column
    v = tl.load(x + at, mask=(r[:, None] < n) & (c[None, :] < width), other=0.0).to(tl.float32)
    if factor is not None:
        v *= tl.load(factor + c, mask=c < width, other=0.0)[None, :]
    if inside is not None:
        v = tl.where((tl.load(inside + c, mask=c < width, other=0) != 0)[None, :], v, 0.0)
    return v


@triton.jit
def _magnitude(v):
    """Return |v|; NaN counts as infinite, so that its row cannot become finite."""
    return tl.where(v == v, tl.abs(v), float("inf"))


@triton.jit
def _scale_of(largest):
    scale = tl.div_rn(largest, 127.0)
    return tl.where(scale > 0.0, scale, 1.0)


@triton.jit
def _round(v, scale):
    """Round v/scale to int8, ties to even: the constant shifts the fraction out of the 24 bits of an fp32."""
    return ((tl.div_rn(v, scale) + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit(do_not_specialize=["n"])
def quantize_rows(
    x, x_row, x_column, n, width, factor, inside, columns, rounded, scales, apart,
    ROWS: constexpr, BLOCK: constexpr, WHOLE: constexpr, S: constexpr,
):  # fmt: skip
    """Round ROWS rows for each program to int8, with one scale for each row.

    Args:
        x: [n, width], with its strides x_row and x_column.
        factor: Column factors fp32 [width], or None.
        inside, columns: From :func:`choose_columns`, or None.
        rounded: Result int8 [n, width], zeros for the outliers.
        scales: Result fp32 [n].
        apart: Result [n, S], the outliers in x's dtype, or None.
        BLOCK, WHOLE: Columns of a block, and whether it holds a whole row.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = r[:, None] < n
    c = tl.arange(0, BLOCK)
    rounded += r[:, None] * width + c[None, :]
    if WHOLE:
        v = _piece(x, x_row, x_column, r, c, n, width, factor, inside)
        scale = _scale_of(tl.max(_magnitude(v), 1))
        tl.store(rounded, _round(v, scale[:, None]), mask=rows & (c[None, :] < width))
    else:
        largest = tl.zeros((ROWS, BLOCK), tl.float32)
        for at in range(0, width, BLOCK):
            v = _piece(x, x_row, x_column, r, at + c, n, width, factor, inside)
            largest = tl.maximum(largest, _magnitude(v))
        scale = _scale_of(tl.max(largest, 1))
        for at in range(0, width, BLOCK):
            v = _piece(x, x_row, x_column, r, at + c, n, width, factor, inside)
            tl.store(rounded + at, _round(v, scale[:, None]), mask=rows & (at + c[None, :] < width))
    tl.store(scales + r, scale, mask=r < n)
    if apart is not None:
        slot = tl.arange(0, S)
        here = r[:, None] * x_row + tl.load(columns + slot)[None, :].to(tl.int64) * x_column
        outliers = tl.load(x + here, mask=rows & (slot < tl.load(columns + S))[None, :], other=0.0)
        tl.store(apart + r[:, None] * S + slot[None, :], outliers, mask=rows)


@triton.jit
def turn(w, turned, height, width, BLOCK: constexpr):
    """Transpose an int8 matrix [4·height, 4·width], 4 × 4 bytes at a time in registers.

    Args:
        w: The matrix as int32 [4·height, width].
        turned: Result as int32 [4·width, height].
        height, width: Sizes in words of four bytes.
        BLOCK: Words of a block, in both directions.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (r < height) & (c < width)
    w += 4 * r.to(tl.int64) * width + c
    row_0 = tl.load(w, mask=mask, other=0)
    row_1 = tl.load(w + width, mask=mask, other=0)
    row_2 = tl.load(w + 2 * width, mask=mask, other=0)
    row_3 = tl.load(w + 3 * width, mask=mask, other=0)
    for byte in tl.static_range(4):
        low = ((row_0 >> 8 * byte) & 255) | (((row_1 >> 8 * byte) & 255) << 8)
        high = (((row_2 >> 8 * byte) & 255) << 16) | ((row_3 >> 8 * byte) << 24)
        tl.store(turned + (4 * c.to(tl.int64) + byte) * height + r, low | high, mask=mask)


@triton.jit
def _add_low(
    total, u, v, r, c, n, width, rank, u_row, u_rank, v_row, v_rank,
    BLOCK: constexpr, KIND: constexpr, EXACT: constexpr,
):  # fmt: skip
    """Return total [r, c] + u[r]·v[c]ᵀ: products in KIND, sums in fp32. An fp32 KIND is tf32, and EXACT in three passes."""
    for at in tl.range(0, rank, BLOCK, num_stages=1):
        k = at + tl.arange(0, BLOCK)
        left = u + r[:, None].to(tl.int64) * u_row + k[None, :] * u_rank
        right = v + c[None, :].to(tl.int64) * v_row + k[:, None].to(tl.int64) * v_rank
        left = tl.load(left, mask=(r[:, None] < n) & (k[None, :] < rank), other=0.0).to(KIND)
        right = tl.load(right, mask=(c[None, :] < width) & (k[:, None] < rank), other=0.0).to(KIND)
        total = tl.dot(left, right, total, input_precision="tf32x3" if EXACT else "tf32")
    return total


@triton.jit(do_not_specialize=["n", "bucket"])
def multiply(
    a, w, out, n, width, inner, bucket, w_row, w_inner, row_scale, column_scale, bias,
    apart, picked, u, v, rank, u_row, u_rank, v_row, v_rank,
    TMA: constexpr, EVEN: constexpr, S: constexpr, RANK: constexpr, APART_KIND: constexpr, LOW_KIND: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr, GROUP: constexpr,
):  # fmt: skip
    """Compute out [n, width] = (row_scale·a·wᵀ + apart·pickedᵀ)·column_scale + bias + u·vᵀ.

    Args:
        a: int8 [n, inner]; with TMA a tensor descriptor.
        w: int8 [width, inner], with its strides w_row and w_inner; with TMA a tensor descriptor, contiguous in ``inner``.
        bucket: n rounded up to a power of two, by which tiles are chosen.
        row_scale, column_scale, bias: [n], and [width] or None.
        apart, picked: Outlier columns of a [n, S] and of w [width, S], or None.
        u, v: Low-rank factors [n, rank] and [width, rank] with their strides, or None.
        EVEN: Whether BLOCK_K divides ``inner``.
        APART_KIND, LOW_KIND: Dtypes that the outlier and the low-rank products are computed in.
    """
    # Programs that run together share rows of a and w in L2: GROUP blocks of rows go through all columns side by side.
    across = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * across) * GROUP
    size = tl.minimum(tl.cdiv(n, BLOCK_M) - first, GROUP)
    m = first + pid % (GROUP * across) % size
    at_n = pid % (GROUP * across) // size * BLOCK_N
    r = m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = at_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if TMA:
        for at in range(0, inner, BLOCK_K):
            total = tl.dot(a.load([m * BLOCK_M, at]), w.load([at_n, at]).T, total)
    else:
        a += r[:, None].to(tl.int64) * inner + k[None, :]
        w += c[None, :].to(tl.int64) * w_row + k[:, None].to(tl.int64) * w_inner
        for at in range(0, inner, BLOCK_K):
            deep = EVEN | (k < inner - at)
            left = tl.load(a, mask=(r[:, None] < n) & deep[None, :], other=0)
            right = tl.load(w, mask=(c[None, :] < width) & deep[:, None], other=0)
            total = tl.dot(left, right, total)
            a += BLOCK_K
            w += BLOCK_K * w_inner
    exact: constexpr = out.dtype.element_ty == tl.float32
    h = total.to(tl.float32) * tl.load(row_scale + r, mask=r < n, other=0.0)[:, None]
    if apart is not None:
        h = _add_low(h, apart, picked, r, c, n, width, S, S, 1, S, 1, S, APART_KIND, exact)
    if column_scale is not None:
        h *= tl.load(column_scale + c, mask=c < width, other=0.0)[None, :]
    if bias is not None:
        h += tl.load(bias + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
    if u is not None:
        h = _add_low(h, u, v, r, c, n, width, rank, u_row, u_rank, v_row, v_rank, RANK, LOW_KIND, exact)
    out += r[:, None].to(tl.int64) * width + c[None, :]
    tl.store(out, h.to(out.dtype.element_ty), mask=(r[:, None] < n) & (c[None, :] < width))


INTERPRETED = not isinstance(multiply, triton.JITFunction)

#: Rows, columns and depth of a tile, warps, pipeline stages: for Hopper, for GPUs with less shared memory, for few rows.
TILES = (
    (128, 256, 128, 8, 3), (128, 256, 128, 8, 4), (256, 128, 128, 8, 3), (128, 256, 256, 8, 2),
    (128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 4, 3), (64, 128, 64, 4, 4),
    (64, 64, 256, 4, 3), (32, 64, 256, 4, 4), (16, 128, 256, 4, 4), (16, 64, 256, 4, 4),
)  # fmt: skip


def _fitting(configs: list[Any], named: dict[str, Any], **others: Any) -> list[Any]:
    """Select tiles with at most as many rows as x, at least 64 if x has them; large ones spill registers without TMA."""
    bucket, largest = {**named, **others}["bucket"], 1 << (15 if others["TMA"] else 14)
    blocks = [(config, config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]) for config in configs]
    return [config for config, m, n in blocks if min(bucket, 64) <= m <= bucket and m * n <= largest]


def _shape_descriptors(arguments: dict[str, Any]) -> None:
    if arguments["TMA"]:
        arguments["a"].block_shape = [arguments["BLOCK_M"], arguments["BLOCK_K"]]
        arguments["w"].block_shape = [arguments["BLOCK_N"], arguments["BLOCK_K"]]


def tune(tiles: tuple[tuple[int, ...], ...], **options: Any) -> Any:
    """Return :func:`multiply` with autotuned tiles: those that fit are timed at the first product of each shape class."""
    configs = [
        triton.Config(
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8},
            num_warps=warps,
            num_stages=stages,
            pre_hook=_shape_descriptors,
        )
        for m, n, k, warps, stages in tiles
    ]
    key = ["width", "inner", "bucket", "w_inner", "TMA"]
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": _fitting}, **options)(multiply)


tuned_multiply = multiply if INTERPRETED else tune(TILES)
