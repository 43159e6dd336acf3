/* The fp32 product of many tokens with a frozen weight (AVX2, AVX-512).
 *
 * torch multiplies with Intel's MKL on x86, which reaches about two thirds of the peak of AMD's processors. This product
 * reaches 80 to 90 % of it. Reference: kernels/frozen_linear.py.
 */
#include "gemm_tiles.h"
#if defined(__AVX2__)

enum {
    F32_KC = 640,                /* depth of a block, at most: panels stay in the L2 cache */
    F32_LOW_RANK_KC = 192,       /* depth of a block of a low-rank product */
    F32_PANELS = 2,              /* panels that a strip of x is multiplied with while it is in the L1 cache */
    F32_ROW_STRIDE = F32_KC + 16 /* row stride of a packed strip; +16 floats avoids cache-set conflicts */
};

/* Number of floats of the workspace that lk_gemm_f32 packs x into. */
ptrdiff_t lk_packed_f32_size(ptrdiff_t n)
{
    return (n + MR - 1) / MR * MR * F32_ROW_STRIDE;
}

/* Transpose eight rows of eight floats into eight rows NR apart. */
static inline void f32_transpose(const float *from, ptrdiff_t stride, float *to)
{
    __m256 rows[8], two[8], four[8];
    for (int r = 0; r < 8; r++)
        rows[r] = _mm256_loadu_ps(from + r * stride);
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
        _mm256_storeu_ps(to + r * NR, _mm256_permute2f128_ps(four[r], four[4 + r], 0x20));
        _mm256_storeu_ps(to + (r + 4) * NR, _mm256_permute2f128_ps(four[r], four[4 + r], 0x31));
    }
}

/* `size` rows of m [depth, columns] from k0 on, columns from j on -> panel [size][NR]; zeros beyond the last column. m is
 * column-major if `transposed`. */
static void f32_pack_panel(const float *m, float *panel, ptrdiff_t depth, ptrdiff_t columns, ptrdiff_t j, ptrdiff_t k0,
                           ptrdiff_t size, int transposed)
{
    const ptrdiff_t width = min_of(columns - j, NR);
    if (!transposed) {
        for (ptrdiff_t k = 0; k < size; k++) {
            memcpy(panel + k * NR, m + (k0 + k) * columns + j, (size_t)width * sizeof(float));
            memset(panel + k * NR + width, 0, (size_t)(NR - width) * sizeof(float));
        }
        return;
    }
    for (ptrdiff_t c = 0; c < NR; c += 8) {
        ptrdiff_t k = 0;
        if (c + 8 <= width)
            for (; k + 8 <= size; k += 8)
                f32_transpose(m + (j + c) * depth + k0 + k, depth, panel + k * NR + c);
        for (; k < size; k++)
            for (ptrdiff_t e = c; e < c + 8; e++)
                panel[k * NR + e] = e < width ? m[(j + e) * depth + k0 + k] : 0;
    }
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

/* Depth of the blocks, whose sums are added one after the other: the order of every sum, whatever the number of threads.
 * Where x or m is low-rank, blocks are smaller: those of MKL 2024 with AVX-512, so that results are often the same. */
static ptrdiff_t f32_kc(ptrdiff_t depth, int low_rank)
{
    const ptrdiff_t blocks = (depth + F32_KC - 1) / F32_KC;
    if (!low_rank)
        return (depth + blocks - 1) / blocks;
    return depth <= F32_LOW_RANK_KC ? depth : depth < 2 * F32_LOW_RANK_KC ? depth / 2 : F32_LOW_RANK_KC;
}

/* h = x m + bias for x [n, depth] and m [depth, columns], column-major if `transposed`; bias may be NULL. With `add`, h
 * += x m. One block of x at a time is packed into `strips`, [row][F32_ROW_STRIDE]; the last strip is padded with copies of
 * the last row. */
void lk_gemm_f32(const float *x, const float *m, const float *bias, float *strips, float *h, ptrdiff_t n, ptrdiff_t depth,
                 ptrdiff_t columns, int transposed, int low_rank, int add)
{
    const ptrdiff_t size = f32_kc(depth, low_rank), wide = F32_PANELS * NR;
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
                    f32_pack_panel(m, panels[j / NR], depth, columns, begin + j, from, here, transposed);
                for (ptrdiff_t s = part * each; s < last; s++)
                    for (ptrdiff_t j = 0; j < width; j += NR)
                        f32_tile(strips + s * MR * F32_ROW_STRIDE, panels[j / NR], here, start + j,
                                 h + s * MR * columns + begin + j, columns, min_of(n - s * MR, MR),
                                 min_of(width - j, NR), from == 0 && !add);
            }
    }
}
#endif
