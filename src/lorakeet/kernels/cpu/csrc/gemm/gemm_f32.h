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

/* The sums of `size` products of `count` rows of a strip with `halves` vectors of a panel: both are constants. */
static inline __attribute__((always_inline)) void f32_sum(const float *strip, const float *panel, ptrdiff_t size,
                                                          const int count, const int halves, floats made[MR][2])
{
    floats s[MR][2];
    for (int r = 0; r < count; r++)
        s[r][0] = s[r][1] = (floats){0};
    for (ptrdiff_t k = 0; k < size; k++, panel += NR) {
        const floats low = load(panel), high = load(panel + VLEN);
        for (int r = 0; r < count; r++) {
            const float x = strip[r * F32_ROW_STRIDE + k];
            s[r][0] += x * low;
            if (halves == 2)
                s[r][1] += x * high;
        }
    }
    memcpy(made, s, (size_t)count * sizeof s[0]); /* a copy: variable indices would keep `s` out of the registers */
}

/* A tile of h: the first block writes its sums plus the bias, later blocks add theirs. A sum is the same in a smaller tile. */
static inline void f32_tile(const float *strip, const float *panel, ptrdiff_t size, const float *bias, float *h,
                            ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, int first)
{
    floats made[MR][2];
    if (columns <= VLEN)
        f32_sum(strip, panel, size, MR, 1, made);
    else if (rows <= MR / 3)
        f32_sum(strip, panel, size, MR / 3, 2, made);
    else if (rows <= 2 * MR / 3)
        f32_sum(strip, panel, size, 2 * MR / 3, 2, made);
    else
        f32_sum(strip, panel, size, MR, 2, made);
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

/* h = x m + bias for x [n, depth] and m [depth, columns], in blocks of `size` of the depth; bias may be NULL. With `add`,
 * h += x m. One block of x at a time is packed into `strips`, [row][F32_ROW_STRIDE]; the last strip is padded with copies
 * of the last row. */
static inline __attribute__((always_inline)) void f32_multiply(const float *x, const struct f32_factor *m,
                                                               f32_packer *pack, const float *bias, float *strips,
                                                               float *h, ptrdiff_t n, ptrdiff_t size, int add)
{
    const ptrdiff_t depth = m->depth, columns = m->columns, wide = F32_PANELS * NR;
    const ptrdiff_t count = (n + MR - 1) / MR, sides = (columns + wide - 1) / wide, parts = row_parts(sides, n);
    const ptrdiff_t each = (count + parts - 1) / parts;
#pragma omp parallel if (n * columns > 4096)
    for (ptrdiff_t from = 0; from < depth; from += size) {
        const ptrdiff_t here = min_of(depth - from, size);
#pragma omp for schedule(static)
        for (ptrdiff_t r = 0; r < count * MR; r++)
            memcpy(strips + r * F32_ROW_STRIDE, x + min_of(r, n - 1) * depth + from, (size_t)here * sizeof(float));
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t p = 0; p < sides; p++)
            for (ptrdiff_t part = 0; part < parts; part++) {
                const ptrdiff_t begin = p * wide, width = min_of(columns - begin, wide);
                const ptrdiff_t last = min_of((part + 1) * each, count);
                _Alignas(64) float panels[F32_PANELS][F32_KC * NR];
                float start[F32_PANELS * NR] = {0};
                if (bias)
                    memcpy(start, bias + begin, (size_t)width * sizeof(float));
                for (ptrdiff_t j = 0; j < width; j += NR)
                    pack(m, panels[j / NR], begin + j, from, here);
                for (ptrdiff_t s = part * each; s < last; s++)
                    for (ptrdiff_t j = 0; j < width; j += NR)
                        f32_tile(strips + s * MR * F32_ROW_STRIDE, panels[j / NR], here, start + j,
                                 h + s * MR * columns + begin + j, columns, min_of(n - s * MR, MR),
                                 min_of(width - j, NR), from == 0 && !add);
            }
    }
}
#endif
#endif
