/* The product of many fp32 tokens with a weight in bf16, in tiles of AMX-BF16, forward and input gradient.
 *
 * x is split into two planes of bf16, high + low, which keep 16 bits of each value. Both are multiplied with the weight as it
 * is stored, and summed in fp32, each plane on its own. The weight is laid out for tiles a panel at a time, in the cache.
 * Reference: kernels/half_linear.py. */
#include "gemm/amx.h"
#include "gemm/amx_transpose.h"
#if defined(__AVX2__)

enum {
    HALF_STEP = TILE_DEPTH / 2, /* values of the depth of a tile */
    HALF_STEPS = 20,            /* tiles of a block's depth: a panel stays in the L2 cache */
    HALF_KC = HALF_STEPS * HALF_STEP,
    HALF_NR = 2 * TILE_ROWS /* columns of a panel: two tiles */
};

static ptrdiff_t half_rows(ptrdiff_t n)
{
    return (n + TILE_ROWS - 1) / TILE_ROWS;
}

static ptrdiff_t half_steps(ptrdiff_t depth)
{
    return (depth + HALF_STEP - 1) / HALF_STEP;
}

/* Number of bytes that lk_gemm_half_amx packs x into. */
ptrdiff_t lk_packed_half_amx_size(ptrdiff_t n, ptrdiff_t depth)
{
    return half_rows(n) * half_steps(depth) * 2 * TILE_BYTES;
}

/* Round to bf16, in the upper half of the result. A finite number stays finite: one above the largest of bf16 is cut. */
static inline uint32_t half_rounded(uint32_t bits)
{
    const uint32_t infinite = 0x7f800000, nearest = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    const uint32_t nan = (bits & 0x7fffffff) > infinite ? 0x400000 : 0, cut = (bits & 0xffff0000) | nan;
    return (nearest & infinite) == infinite || (bits & infinite) == infinite ? cut : nearest;
}

/* One row of x -> [step][high, low][row of a tile][HALF_STEP] of its row tile; zeros beyond the depth. */
static void half_split_row(const float *row, uint16_t *to, ptrdiff_t depth)
{
    for (ptrdiff_t s = 0; s < half_steps(depth); s++, to += TILE_BYTES)
        for (ptrdiff_t k = 0; k < HALF_STEP; k++) {
            union {
                float value;
                uint32_t bits;
            } x = {s * HALF_STEP + k < depth ? row[s * HALF_STEP + k] : 0.0f}, high, low;
            high.bits = half_rounded(x.bits);
            low.value = x.value - high.value;
            to[k] = (uint16_t)(high.bits >> 16);
            to[TILE_BYTES / 2 + k] = (x.bits & 0x7f800000) == 0x7f800000 ? 0 : (uint16_t)(half_rounded(low.bits) >> 16);
        }
}

/* A tile of W^T: sixteen rows of W [out, in] from j on, and HALF_STEP inputs from k on; zeros beyond its edges. */
static void half_tile_of_channels(const uint16_t *bits, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j, ptrdiff_t k, uint16_t *to)
{
    uint16_t edge[TILE_ROWS][HALF_STEP];
    const uint16_t *from = bits + j * in + k;
    const ptrdiff_t rows = min_of(out - j, TILE_ROWS), left = min_of(in - k, HALF_STEP);
    if (rows == TILE_ROWS && left == HALF_STEP) {
        amx_transpose((const int8_t *)from, in * (ptrdiff_t)sizeof *bits, (int8_t *)to);
        return;
    }
    memset(edge, 0, sizeof edge);
    for (ptrdiff_t r = 0; r < rows; r++)
        memcpy(edge[r], from + r * in, (size_t)left * sizeof *bits);
    amx_transpose((const int8_t *)edge, sizeof edge[0], (int8_t *)to);
}

/* A tile of W [out, in]: HALF_STEP rows from k on, and sixteen columns from j on, two rows interleaved. */
static void half_tile_of_inputs(const uint16_t *bits, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j, ptrdiff_t k, uint16_t *to)
{
    const ptrdiff_t width = min_of(in - j, TILE_ROWS);
    for (ptrdiff_t r = 0; r < HALF_STEP; r += 2, to += HALF_STEP) {
        uint16_t edge[2][TILE_ROWS] = {{0}};
        __m256i rows[2];
        for (ptrdiff_t e = 0; e < 2; e++) {
            const uint16_t *from = bits + (k + r + e) * in + j;
            if (k + r + e >= out || width < TILE_ROWS) {
                if (k + r + e < out && width > 0)
                    memcpy(edge[e], from, (size_t)width * sizeof *from);
                from = edge[e];
            }
            rows[e] = _mm256_loadu_si256((const __m256i *)from);
        }
        const __m256i low = _mm256_unpacklo_epi16(rows[0], rows[1]), high = _mm256_unpackhi_epi16(rows[0], rows[1]);
        _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((__m256i *)to + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
}

/* sums [high, low][two tiles of columns][16][16] = tiles of x times a panel. */
static inline void half_multiply(const uint16_t *tiles, const uint16_t *panel, ptrdiff_t steps, float sums[4][TILE_BYTES / 4])
{
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (ptrdiff_t s = 0; s < steps; s++, tiles += TILE_BYTES, panel += TILE_BYTES) {
        tile_load(4, tiles);
        tile_load(6, panel);
        tile_dot_bf16(0, 4, 6);
        tile_load(7, panel + TILE_BYTES / 2);
        tile_dot_bf16(1, 4, 7);
        tile_load(5, tiles + TILE_BYTES / 2);
        tile_dot_bf16(2, 5, 6);
        tile_dot_bf16(3, 5, 7);
    }
    tile_store(0, sums[0]);
    tile_store(1, sums[1]);
    tile_store(2, sums[2]);
    tile_store(3, sums[3]);
}

/* h = x m + bias for x [n, depth] and m [depth, columns] in bf16, column-major if `transposed`; bias may be NULL. `tiles`
 * has lk_packed_half_amx_size(n, depth) bytes. */
void lk_gemm_half_amx(const float *x, const uint16_t *bits, const float *bias, uint16_t *tiles, float *h, ptrdiff_t n,
                      ptrdiff_t depth, ptrdiff_t columns, int transposed)
{
    const ptrdiff_t steps = half_steps(depth), count = half_rows(n), panels = (columns + HALF_NR - 1) / HALF_NR;
    const ptrdiff_t parts = row_parts(panels, n), each = (count + parts - 1) / parts;
#pragma omp parallel if (n * columns > 4096)
    {
        tiles_configure();
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < count * TILE_ROWS; i++)
            half_split_row(x + min_of(i, n - 1) * depth,
                           tiles + i / TILE_ROWS * steps * TILE_BYTES + i % TILE_ROWS * HALF_STEP, depth);
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t p = 0; p < panels; p++)
            for (ptrdiff_t part = 0; part < parts; part++) {
                const ptrdiff_t j = p * HALF_NR, width = min_of(columns - j, HALF_NR), last = min_of((part + 1) * each, count);
                _Alignas(64) uint16_t panel[HALF_STEPS * TILE_BYTES];
                _Alignas(64) float sums[4][TILE_BYTES / 4];
                for (ptrdiff_t from = 0; from < steps; from += HALF_STEPS) {
                    const ptrdiff_t here = min_of(steps - from, HALF_STEPS);
                    for (ptrdiff_t s = 0; s < 2 * here; s++) {
                        const ptrdiff_t k = (from + s / 2) * HALF_STEP, c = j + s % 2 * TILE_ROWS;
                        uint16_t *to = panel + s * TILE_BYTES / 2;
                        if (transposed)
                            half_tile_of_channels(bits, columns, depth, c, k, to);
                        else
                            half_tile_of_inputs(bits, depth, columns, c, k, to);
                    }
                    for (ptrdiff_t t = part * each; t < last; t++) {
                        half_multiply(tiles + (t * steps + from) * TILE_BYTES, panel, here, sums);
                        for (ptrdiff_t i = t * TILE_ROWS; i < min_of(n, (t + 1) * TILE_ROWS); i++)
                            for (ptrdiff_t c = 0; c < width; c++) {
                                const ptrdiff_t tile = c / TILE_ROWS, at = i % TILE_ROWS * TILE_ROWS + c % TILE_ROWS;
                                float *to = h + i * columns + j + c, start = bias ? bias[j + c] : 0.0f;
                                *to = (from ? *to : start) + (sums[tile][at] + sums[2 + tile][at]);
                            }
                    }
                }
            }
        tiles_release();
    }
}
#endif
