/* The blocks and tiles of an fp32 product of many tokens, shared by every format that fills its panels with fp32.
 *
 * torch multiplies with Intel's MKL on x86, which reaches about two thirds of the peak of AMD's processors. This product
 * reaches 80 to 90 % of it. Reference: kernels/frozen_linear.py. */
#ifndef LORAKEET_GEMM_F32_H
#define LORAKEET_GEMM_F32_H

#include "gemm_tiles.h"
#if defined(__AVX2__)

enum {
    F32_KC = 640,                /* depth of a block, at most: panels stay in the L2 cache */
    F32_LOW_RANK_KC = 192,       /* depth of a block of a low-rank product */
    F32_PANELS = 2,              /* panels that a strip of x is multiplied with while it is in the L1 cache */
    F32_ROW_STRIDE = F32_KC + 16 /* row stride of a packed strip; +16 floats avoids cache-set conflicts */
};

/* The right factor m [depth, columns] of a product, in a format that a packer knows. */
struct f32_factor {
    const void *data;
    ptrdiff_t depth, columns;
    int transposed; /* column-major */
};

/* `size` rows of m from k0 on, columns from j on -> panel [size][NR]; zeros beyond the last column. */
typedef void f32_packer(const struct f32_factor *m, float *panel, ptrdiff_t j, ptrdiff_t k0, ptrdiff_t size);

/* Depth of the blocks, whose sums are added one after the other: the order of every sum, whatever the number of threads. */
static inline ptrdiff_t f32_kc(ptrdiff_t depth)
{
    const ptrdiff_t blocks = (depth + F32_KC - 1) / F32_KC;
    return (depth + blocks - 1) / blocks;
}

/* Transpose eight rows of eight floats. */
static inline void f32_transposed(const __m256 rows[8], __m256 to[8])
{
    __m256 two[8], four[8];
    for (int r = 0; r < 4; r++) {
        two[r] = _mm256_unpacklo_ps(rows[2 * r], rows[2 * r + 1]);
        two[4 + r] = _mm256_unpackhi_ps(rows[2 * r], rows[2 * r + 1]);
    }
    for (int r = 0; r < 4; r++) { /* columns r and r + 4 of rows 0 to 3, then of rows 4 to 7 */
        const int a = r / 2 * 4;
        const __m256 x = two[a], y = two[a + 1], z = two[a + 2], w = two[a + 3];
        four[r] = r % 2 ? _mm256_shuffle_ps(x, y, 0xEE) : _mm256_shuffle_ps(x, y, 0x44);
        four[4 + r] = r % 2 ? _mm256_shuffle_ps(z, w, 0xEE) : _mm256_shuffle_ps(z, w, 0x44);
    }
    for (int r = 0; r < 4; r++) {
        to[r] = _mm256_permute2f128_ps(four[r], four[4 + r], 0x20);
        to[r + 4] = _mm256_permute2f128_ps(four[r], four[4 + r], 0x31);
    }
}

/* Transpose eight rows of eight floats into eight rows NR apart. */
static inline void f32_transpose_rows(const __m256 rows[8], float *to)
{
    __m256 columns[8];
    f32_transposed(rows, columns);
    for (int r = 0; r < 8; r++)
        _mm256_storeu_ps(to + r * NR, columns[r]);
}

/* Transpose eight rows of eight floats, `stride` apart, into eight rows NR apart. */
static inline void f32_transpose(const float *from, ptrdiff_t stride, float *to)
{
    __m256 rows[8];
    for (int r = 0; r < 8; r++)
        rows[r] = _mm256_loadu_ps(from + r * stride);
    f32_transpose_rows(rows, to);
}

/* The packer of a factor in fp32. */
static inline void f32_pack_panel(const struct f32_factor *factor, float *panel, ptrdiff_t j, ptrdiff_t k0, ptrdiff_t size)
{
    const float *m = factor->data;
    const ptrdiff_t depth = factor->depth, columns = factor->columns;
    const ptrdiff_t width = min_of(columns - j, NR);
    if (!factor->transposed && width == NR) { /* a copy of constant size */
        for (ptrdiff_t k = 0; k < size; k++)
            memcpy(panel + k * NR, m + (k0 + k) * columns + j, NR * sizeof(float));
        return;
    }
    if (!factor->transposed) {
        for (ptrdiff_t k = 0; k < size; k++) {
            memcpy(panel + k * NR, m + (k0 + k) * columns + j, (size_t)width * sizeof(float));
            memset(panel + k * NR + width, 0, (size_t)(NR - width) * sizeof(float));
        }
        return;
    }
    for (ptrdiff_t c = 0; c < NR; c += 8) {
        ptrdiff_t k = 0;
        if (c + 8 <= width)
            for (; k + 8 <= size; k += 8) {
                for (ptrdiff_t r = 8; k % 16 == 0 && r < 16; r++) /* the next eight rows come from memory */
                    __builtin_prefetch(m + (j + c + r) * depth + k0 + k);
                f32_transpose(m + (j + c) * depth + k0 + k, depth, panel + k * NR + c);
            }
        for (; k < size; k++)
            for (ptrdiff_t e = c; e < c + 8; e++)
                panel[k * NR + e] = e < width ? m[(j + e) * depth + k0 + k] : 0;
    }
}

/* The sums of `size` products of `count` rows of x with `halves` vectors of a panel. Rows are `stride` apart, their values
 * `step`. Inlined, as most of these are constants. */
static inline __attribute__((always_inline)) void f32_sum(const float *x, ptrdiff_t stride, ptrdiff_t step,
                                                          const float *panel, ptrdiff_t size, const int count,
                                                          const int halves, floats s[MR][2])
{
    const float *three[MR / 3]; /* addresses of every third row: those of all rows would not fit the registers */
    for (int r = 0; r < count; r++)
        s[r][0] = s[r][1] = (floats){0};
    for (int r = 0; r < count; r += 3)
        three[r / 3] = x + r * stride;
    for (ptrdiff_t k = 0; k < size; k++, panel += NR) {
        const floats low = load(panel), high = load(panel + VLEN);
        for (int r = 0; r < count; r++) {
            if (r % 3 == 0)
                __asm__("" : "+r"(three[r / 3])); /* or the compiler makes an address for each row after all */
            const float value = three[r / 3][r % 3 * stride];
            s[r][0] += value * low;
            if (halves == 2)
                s[r][1] += value * high;
        }
        for (int r = 0; r < count; r += 3)
            three[r / 3] += step;
    }
}
/* Write or add the sums of a tile: the first block writes its sums plus the bias, later blocks add theirs. */
static inline __attribute__((always_inline)) void f32_write(floats made[MR][2], const float *bias, float *h,
                                                            ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, int first)
{
    for (ptrdiff_t r = 0; r < rows; r++) {
        float edge[NR], *to = columns == NR ? h + r * stride : edge;
        if (columns < NR && !first)
            memcpy(edge, h + r * stride, (size_t)columns * sizeof(float));
        for (int half = 0; half < 2; half++)
            store(to + VLEN * half, made[r][half] + load((first ? bias : to) + VLEN * half));
        if (columns < NR)
            memcpy(h + r * stride, edge, (size_t)columns * sizeof(float));
    }
}

/* A tile of h from `rows` rows of x, x_stride apart, whose values are `step` apart. The next multiple of MR / 3 of the rows
 * is read. A sum is the same in a smaller tile. */
static inline __attribute__((always_inline)) void f32_tile(const float *x, ptrdiff_t x_stride, ptrdiff_t step,
                                                           const float *panel, ptrdiff_t size, const float *bias,
                                                           float *h, ptrdiff_t stride, ptrdiff_t rows,
                                                           ptrdiff_t columns, int first)
{
    floats sums[MR][2], made[MR][2]; /* a copy: variable indices would keep the sums out of the registers */
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t c = 0; c < columns; c += VLEN)
            __builtin_prefetch(h + r * stride + c, 1);
    if (rows == MR && columns == NR) {
        f32_sum(x, x_stride, step, panel, size, MR, 2, sums);
        f32_write(sums, bias, h, stride, MR, NR, first);
        return;
    }
    if (columns <= VLEN && rows <= MR / 3)
        f32_sum(x, x_stride, step, panel, size, MR / 3, 1, made);
    else if (columns <= VLEN && rows <= 2 * MR / 3)
        f32_sum(x, x_stride, step, panel, size, 2 * MR / 3, 1, made);
    else if (columns <= VLEN)
        f32_sum(x, x_stride, step, panel, size, MR, 1, made);
    else if (rows <= MR / 3)
        f32_sum(x, x_stride, step, panel, size, MR / 3, 2, made);
    else if (rows <= 2 * MR / 3)
        f32_sum(x, x_stride, step, panel, size, 2 * MR / 3, 2, made);
    else
        f32_sum(x, x_stride, step, panel, size, MR, 2, made);
    f32_write(made, bias, h, stride, rows, columns, first);
}

/* A product h = x m + bias, or h += x m with `add`, in blocks of `size` of the depth; bias may be NULL. */
struct f32_product {
    const float *x;
    const struct f32_factor *m;
    const float *bias;
    float *strips; /* workspace: a block of x, [row][F32_ROW_STRIDE] */
    float *h;
    ptrdiff_t n, size;
    int add;
};

/* Whether the rows of a strip of x would share few sets of the L1 cache: x is then packed first. */
static inline int f32_conflicts(ptrdiff_t stride)
{
    const ptrdiff_t line = 16, apart = stride % 1024; /* floats; a set recurs every 4096 bytes */
    return stride > line && (apart < line || apart > 1024 - line);
}

/* Columns of h from `begin` on and the strips from `s` to `last`, over a part of the depth from `from` to `to`. */
static inline __attribute__((always_inline)) void f32_side(const struct f32_product *p, f32_packer *pack, ptrdiff_t begin,
                                                           ptrdiff_t s, ptrdiff_t last, ptrdiff_t from, ptrdiff_t to,
                                                           int packed)
{
    const ptrdiff_t columns = p->m->columns, depth = p->m->depth, width = min_of(columns - begin, F32_PANELS * NR);
    const ptrdiff_t stride = packed ? F32_ROW_STRIDE : depth, whole = p->n / (MR / 3) * (MR / 3);
    _Alignas(64) float panels[F32_PANELS][F32_KC * NR];
    float start[F32_PANELS * NR] = {0}, edge[MR * F32_ROW_STRIDE];
    if (p->bias)
        memcpy(start, p->bias + begin, (size_t)width * sizeof(float));
    for (; from < to; from += p->size) {
        const ptrdiff_t here = min_of(to - from, p->size);
        for (ptrdiff_t j = 0; j < width; j += NR)
            pack(p->m, panels[j / NR], begin + j, from, here);
        for (ptrdiff_t i = s * MR; i < min_of(last * MR, p->n); i += MR) {
            const float *x = packed ? p->strips + i * stride : p->x + i * stride + from;
            const ptrdiff_t rows = min_of(p->n - i, MR);
            ptrdiff_t apart = stride;
            if (rows < MR && p->n > whole) { /* the last rows, padded with zeros */
                memset(edge, 0, sizeof edge);
                for (ptrdiff_t r = 0; r < rows; r++)
                    memcpy(edge + r * F32_ROW_STRIDE, x + r * stride, (size_t)here * sizeof(float));
                x = edge;
                apart = F32_ROW_STRIDE;
            }
            for (ptrdiff_t j = 0; j < width; j += NR)
                f32_tile(x, apart, 1, panels[j / NR], here, start + j, p->h + i * columns + begin + j, columns, rows,
                         min_of(width - j, NR), from == 0 && !p->add);
        }
    }
}

/* Multiply by sides of a few panels, shared by threads. */
static inline __attribute__((always_inline)) void f32_multiply(const struct f32_product *product, f32_packer *pack)
{
    const struct f32_product p = *product;
    const ptrdiff_t n = p.n, depth = p.m->depth, columns = p.m->columns, wide = F32_PANELS * NR;
    const ptrdiff_t count = (n + MR - 1) / MR, sides = (columns + wide - 1) / wide, parts = row_parts(sides, n);
    const ptrdiff_t each = (count + parts - 1) / parts;
    const int packed = f32_conflicts(depth);
    const ptrdiff_t together = packed ? p.size : depth;
#pragma omp parallel if (n * columns > 4096)
    for (ptrdiff_t from = 0; from < depth; from += together) {
        const ptrdiff_t to = min_of(from + together, depth);
        if (packed) {
#pragma omp for schedule(static)
            for (ptrdiff_t i = 0; i < n; i++)
                memcpy(p.strips + i * F32_ROW_STRIDE, p.x + i * depth + from, (size_t)(to - from) * sizeof(float));
        }
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t side = 0; side < sides; side++)
            for (ptrdiff_t part = 0; part < parts; part++)
                f32_side(&p, pack, side * wide, part * each, min_of((part + 1) * each, count), from, to, packed);
    }
}
#endif
#endif
