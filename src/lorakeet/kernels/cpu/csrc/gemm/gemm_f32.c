/* The fp32 product of many tokens with a frozen weight (AVX2, AVX-512). Reference: kernels/frozen_linear.py. */
#include "gemm_f32.h"
#if defined(__AVX2__)

/* Number of floats of the workspace that lk_gemm_f32 packs x into. */
ptrdiff_t lk_packed_f32_size(ptrdiff_t n)
{
    return (n + MR - 1) / MR * MR * F32_ROW_STRIDE;
}

/* Depth of the blocks where x or m is low-rank: those of MKL 2024 with AVX-512, so that results are often the same. */
static ptrdiff_t f32_low_rank_kc(ptrdiff_t depth)
{
    return depth <= F32_LOW_RANK_KC ? depth : depth < 2 * F32_LOW_RANK_KC ? depth / 2 : F32_LOW_RANK_KC;
}

/* h = x m + bias for x [n, depth] and m [depth, columns], column-major if `transposed`; bias may be NULL. With `add`, h
 * += x m. `strips` has lk_packed_f32_size(n) floats. */
void lk_gemm_f32(const float *x, const float *m, const float *bias, float *strips, float *h, ptrdiff_t n, ptrdiff_t depth,
                 ptrdiff_t columns, int transposed, int low_rank, int add)
{
    const struct f32_factor factor = {m, depth, columns, transposed};
    const ptrdiff_t size = low_rank ? f32_low_rank_kc(depth) : f32_kc(depth);
    const struct f32_product product = {x, &factor, bias, strips, h, n, size, add};
    f32_multiply(&product, f32_pack_panel);
}
#endif
