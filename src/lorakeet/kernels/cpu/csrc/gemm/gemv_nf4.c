/* The 4-bit product of few tokens (GEMV): memory-bound, the weight is read once and looked up in registers.
 *
 * Reference: kernels/nf4/reference.py.
 */
#include "nf4.h"

/* One tile of h: MR rows of the weight by TOKENS rows of x. Both are constants, so the sums stay in registers. */
#define NF4_GEMV_TILE(MR, TOKENS)                                                                                      \
    static void nf4_gemv_tile_##MR##_##TOKENS(const float *x, const struct nf4_weight *w, ptrdiff_t j,                 \
                                              const float *bias, float *h)                                             \
    {                                                                                                                  \
        const ptrdiff_t in = w->in;                                                                                    \
        floats sums[MR][TOKENS] = {{{0}}};                                                                             \
        for (ptrdiff_t k = 0; k < in; k += NF4_BLOCK) {                                                                \
            floats part[MR][TOKENS] = {{{0}}};                                                                         \
            for (ptrdiff_t at = k; at < k + NF4_BLOCK; at += 2 * VLEN) {                                               \
                floats even[TOKENS], odd[TOKENS];                                                                      \
                for (int t = 0; t < TOKENS; t++)                                                                       \
                    nf4_split(x + t * in + at, &even[t], &odd[t]);                                                     \
                for (int r = 0; r < MR; r++) {                                                                         \
                    floats first, second;                                                                              \
                    nf4_pairs(w->codes + ((j + r) * in + at) / 2, &first, &second);                                    \
                    for (int t = 0; t < TOKENS; t++)                                                                   \
                        part[r][t] += first * even[t] + second * odd[t];                                               \
                }                                                                                                      \
            }                                                                                                          \
            for (int r = 0; r < MR; r++) {                                                                             \
                const float scale = nf4_scale(w, ((j + r) * in + k) / NF4_BLOCK);                                      \
                for (int t = 0; t < TOKENS; t++)                                                                       \
                    sums[r][t] += part[r][t] * scale;                                                                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < MR; r++)                                                                                   \
            for (int t = 0; t < TOKENS; t++) {                                                                         \
                float sum = 0;                                                                                         \
                for (int lane = 0; lane < VLEN; lane++)                                                                \
                    sum += sums[r][t][lane];                                                                           \
                h[t * w->out + j + r] = sum + (bias ? bias[j + r] : 0.0f);                                             \
            }                                                                                                          \
    }
NF4_GEMV_TILE(4, 1)
NF4_GEMV_TILE(2, 4)
NF4_GEMV_TILE(1, 1)
NF4_GEMV_TILE(1, 4)

/* h [n, out] = x W^T + bias for x [n, in]; `in` is a multiple of 64, bias may be NULL. */
void lk_gemv_nf4(const float *x, const uint8_t *codes, const void *absmax, const float *nested, const float *bias, float *h,
                 ptrdiff_t n, ptrdiff_t out, ptrdiff_t in)
{
    const struct nf4_weight w = {codes, absmax, nested, out, in};
    PARALLEL_ROWS(out, in)
    for (ptrdiff_t four = 0; four < out; four += 4) {
        ptrdiff_t i = 0, j;
        for (; i + 4 <= n; i += 4) {
            for (j = four; j + 2 <= out && j < four + 4; j += 2)
                nf4_gemv_tile_2_4(x + i * in, &w, j, bias, h + i * out);
            for (; j < out && j < four + 4; j++)
                nf4_gemv_tile_1_4(x + i * in, &w, j, bias, h + i * out);
        }
        for (; i < n; i++)
            if (four + 4 <= out)
                nf4_gemv_tile_4_1(x + i * in, &w, four, bias, h + i * out);
            else
                for (j = four; j < out; j++)
                    nf4_gemv_tile_1_1(x + i * in, &w, j, bias, h + i * out);
    }
}
