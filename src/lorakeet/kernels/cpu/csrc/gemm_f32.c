/* The fp32 product of many tokens with a frozen weight (AVX2, AVX-512).
 *
 * The matrix library that torch has on x86 is Intel's, and reaches about two thirds of what AMD's processors can do. This one
 * comes to eight or nine tenths there. Its slow truth is in frozen_linear.py.
 */
#include "gemm_tiles.h"
#if defined(__AVX2__)

enum {
    DEPTH = 640, /* at most so much of the depth is multiplied at once: panels stay in the second cache */
    SIDE = 2,    /* panels that a strip of x is multiplied with while it is at hand */
    ROW = DEPTH + 16 /* rows of a strip lie so far apart, and not on the same lines of the cache */
};

/* Whether this is a processor on which it is the faster one: known of AMD's. */
int fp32_is_fast(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
}

/* How many floats fp32_product lays x out in. */
ptrdiff_t fp32_size(ptrdiff_t n)
{
    return (n + STRIP - 1) / STRIP * STRIP * ROW;
}

/* Eight rows of eight numbers -> eight columns, PANEL apart. */
static inline void transpose(const float *from, ptrdiff_t stride, float *to)
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
        _mm256_storeu_ps(to + r * PANEL, _mm256_permute2f128_ps(four[r], four[4 + r], 0x20));
        _mm256_storeu_ps(to + (r + 4) * PANEL, _mm256_permute2f128_ps(four[r], four[4 + r], 0x31));
    }
}

/* `size` rows of m [depth, columns] from k0 on, columns from j on -> panel [size][PANEL]; zeros beyond the last column. m lies
 * in memory column after column if `turned`. */
static void panel_of(const float *m, float *panel, ptrdiff_t depth, ptrdiff_t columns, ptrdiff_t j, ptrdiff_t k0, ptrdiff_t size,
                     int turned)
{
    const ptrdiff_t width = least(columns - j, PANEL);
    if (!turned) {
        for (ptrdiff_t k = 0; k < size; k++) {
            memcpy(panel + k * PANEL, m + (k0 + k) * columns + j, (size_t)width * sizeof(float));
            memset(panel + k * PANEL + width, 0, (size_t)(PANEL - width) * sizeof(float));
        }
        return;
    }
    for (ptrdiff_t c = 0; c < PANEL; c += 8) {
        ptrdiff_t k = 0;
        if (c + 8 <= width)
            for (; k + 8 <= size; k += 8)
                transpose(m + (j + c) * depth + k0 + k, depth, panel + k * PANEL + c);
        for (; k < size; k++)
            for (ptrdiff_t e = c; e < c + 8; e++)
                panel[k * PANEL + e] = e < width ? m[(j + e) * depth + k0 + k] : 0;
    }
}

/* A tile of h: the first block's sums are written, with the bias, what follows is added. */
static inline void tile(const float *strip, const float *panel, ptrdiff_t size, const float *bias, float *h, ptrdiff_t stride,
                        ptrdiff_t rows, ptrdiff_t columns, int first)
{
    floats s[STRIP][2];
    for (int r = 0; r < STRIP; r++)
        s[r][0] = s[r][1] = (floats){0};
    for (ptrdiff_t k = 0; k < size; k++, panel += PANEL) {
        const floats low = load(panel), high = load(panel + WIDTH);
        for (int r = 0; r < STRIP; r++) {
            const float x = strip[r * ROW + k];
            s[r][0] += x * low;
            s[r][1] += x * high;
        }
    }
    floats made[STRIP][2]; /* those above stay in registers if they are not asked for by number */
    memcpy(made, s, sizeof s);
    for (ptrdiff_t r = 0; r < rows; r++) {
        float edge[PANEL], *to = columns == PANEL ? h + r * stride : edge;
        if (columns < PANEL && !first)
            memcpy(edge, h + r * stride, (size_t)columns * sizeof(float));
        for (int half = 0; half < 2; half++)
            store(to + WIDTH * half, made[r][half] + load((first ? bias : to) + WIDTH * half));
        if (columns < PANEL)
            memcpy(h + r * stride, edge, (size_t)columns * sizeof(float));
    }
}

/* h = x m + bias for x [n, depth] and m [depth, columns], which lies column after column if `turned`; bias may be NULL. A block
 * of x at a time is laid out in `strips`, [row][ROW], so that a strip lies in one piece; the last is filled up with the last row. */
void fp32_product(const float *x, const float *m, const float *bias, float *strips, float *h, ptrdiff_t n, ptrdiff_t depth,
                  ptrdiff_t columns, int turned)
{
    const ptrdiff_t blocks = (depth + DEPTH - 1) / DEPTH, size = (depth + blocks - 1) / blocks, wide = SIDE * PANEL;
    const ptrdiff_t count = (n + STRIP - 1) / STRIP, sides = (columns + wide - 1) / wide, parts = row_parts(sides, n);
    const ptrdiff_t each = (count + parts - 1) / parts;
#pragma omp parallel if (n * columns > 4096)
    for (ptrdiff_t from = 0; from < depth; from += size) {
        const ptrdiff_t here = least(depth - from, size);
#pragma omp for schedule(static)
        for (ptrdiff_t r = 0; r < count * STRIP; r++)
            memcpy(strips + r * ROW, x + least(r, n - 1) * depth + from, (size_t)here * sizeof(float));
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t p = 0; p < sides; p++)
            for (ptrdiff_t part = 0; part < parts; part++) {
                const ptrdiff_t begin = p * wide, width = least(columns - begin, wide), last = least((part + 1) * each, count);
                _Alignas(64) float panels[SIDE][DEPTH * PANEL];
                float start[SIDE * PANEL] = {0};
                if (bias)
                    memcpy(start, bias + begin, (size_t)width * sizeof(float));
                for (ptrdiff_t j = 0; j < width; j += PANEL)
                    panel_of(m, panels[j / PANEL], depth, columns, begin + j, from, here, turned);
                for (ptrdiff_t s = part * each; s < last; s++)
                    for (ptrdiff_t j = 0; j < width; j += PANEL)
                        tile(strips + s * STRIP * ROW, panels[j / PANEL], here, start + j, h + s * STRIP * columns + begin + j,
                             columns, least(n - s * STRIP, STRIP), least(width - j, PANEL), from == 0);
            }
    }
}
#endif
