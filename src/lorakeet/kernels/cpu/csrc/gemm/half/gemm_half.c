/* The product of many fp32 tokens with a weight in 16 bits (AVX2, AVX-512), forward and input gradient.
 *
 * A panel at a time is widened into the cache, which is exact, and multiplied there by the tiles of the fp32 product: the
 * result is that of gemm_f32.c with the widened weight, to the bit. Reference: kernels/half_linear.py. */
#include "gemm/gemm_f32.h"
#include "half.h"
#if defined(__AVX2__)

/* Eight rows of sixteen values, `depth` apart and `count` of them there -> eight columns of sixteen rows of a panel. Only
 * `left` of the sixteen values are there. The two values of a dword are transposed together, and bf16 is widened after. */
static inline __attribute__((always_inline)) void half_pack_block(const uint16_t *rows, ptrdiff_t depth, ptrdiff_t count,
                                                                  ptrdiff_t left, float *panel, const int bf16)
{
    __m256 values[2][8];
    for (ptrdiff_t r = 0; r < 8; r++) {
        _Alignas(32) uint16_t edge[16] = {0};
        const uint16_t *from = rows + r * depth;
        if (r >= count)
            from = edge;
        else if (left < 16)
            from = memcpy(edge, from, (size_t)left * sizeof *from);
        if (bf16) {
            values[0][r] = _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)from));
        } else {
            values[0][r] = half_eight(from, 0);
            values[1][r] = half_eight(from + 8, 0);
        }
    }
    if (!bf16) {
        f32_transpose_rows(values[0], panel);
        f32_transpose_rows(values[1], panel + 8 * NR);
        return;
    }
    __m256 pairs[8];
    f32_transposed(values[0], pairs);
    for (ptrdiff_t q = 0; q < 8; q++) {
        const __m256i both = _mm256_castps_si256(pairs[q]), upper = _mm256_set1_epi32(-65536);
        _mm256_storeu_ps(panel + 2 * q * NR, _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)));
        _mm256_storeu_ps(panel + (2 * q + 1) * NR, _mm256_castsi256_ps(_mm256_and_si256(both, upper)));
    }
}

/* Eight rows of `size` values -> eight columns of a panel. */
static inline __attribute__((always_inline)) void half_pack_rows(const uint16_t *rows, ptrdiff_t depth, ptrdiff_t count,
                                                                 float *panel, ptrdiff_t size, const int bf16)
{
    ptrdiff_t k = 0;
    for (; k + 16 <= size; k += 16)
        half_pack_block(rows + k, depth, count, 16, panel + k * NR, bf16);
    if (k < size) {
        _Alignas(32) float columns[16 * NR];
        half_pack_block(rows + k, depth, count, size - k, columns, bf16);
        for (ptrdiff_t e = 0; e < size - k; e++)
            memcpy(panel + (k + e) * NR, columns + e * NR, 8 * sizeof(float));
    }
}

static inline __attribute__((always_inline)) void half_pack(const struct f32_factor *m, float *panel, ptrdiff_t j,
                                                            ptrdiff_t k0, ptrdiff_t size, const int bf16)
{
    const uint16_t *bits = m->data;
    const ptrdiff_t depth = m->depth, columns = m->columns;
    if (m->transposed) { /* forward: m = W^T, whose columns are rows of W */
        for (ptrdiff_t c = 0; c < NR; c += 8)
            half_pack_rows(bits + (j + c) * depth + k0, depth, columns - j - c, panel + c, size, bf16);
        return;
    }
    for (ptrdiff_t k = 0; k < size; k++) /* backward: m = W */
        for (ptrdiff_t c = 0; c < NR; c += VLEN)
            store(panel + k * NR + c, half_load_some(bits + (k0 + k) * columns + j + c, columns - j - c, bf16));
}

static void half_pack_bf16(const struct f32_factor *m, float *panel, ptrdiff_t j, ptrdiff_t k0, ptrdiff_t size)
{
    half_pack(m, panel, j, k0, size, 1);
}

static void half_pack_fp16(const struct f32_factor *m, float *panel, ptrdiff_t j, ptrdiff_t k0, ptrdiff_t size)
{
    half_pack(m, panel, j, k0, size, 0);
}

/* h = x m + bias for x [n, depth] and m [depth, columns] in bf16 or fp16, column-major if `transposed`; bias may be NULL.
 * `strips` has lk_packed_f32_size(n) floats. */
void lk_gemm_half(const float *x, const uint16_t *bits, const float *bias, float *strips, float *h, ptrdiff_t n,
                  ptrdiff_t depth, ptrdiff_t columns, int transposed, int bf16)
{
    const struct f32_factor m = {bits, depth, columns, transposed};
    const struct f32_product product = {x, &m, bias, strips, h, n, f32_kc(depth), 0};
    if (bf16)
        f32_multiply(&product, half_pack_bf16);
    else
        f32_multiply(&product, half_pack_fp16);
}
#endif
