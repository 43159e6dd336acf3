/* The 8-bit product of few tokens (GEMV): memory-bound, the weight is read once and widened in registers.
 *
 * Reference: kernels/int8/reference.py.
 */
#include "common.h"
#include <math.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

static inline floats widen(const int8_t *w)
{
#if VLEN == 16
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
#elif defined(__AVX2__)
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
#else
    floats wide;
    for (int lane = 0; lane < VLEN; lane++)
        wide[lane] = w[lane];
    return wide;
#endif
}

/* Prefetch distance in bytes: hardware prefetchers do not follow MR interleaved streams. */
#define PREFETCH_BYTES 4096

/* One tile of h: MR rows of the weight by TOKENS rows of x. Both are constants, so the sums stay in registers. */
#define GEMV_TILE(MR, TOKENS)                                                                                          \
    static void gemv_tile_##MR##_##TOKENS(const float *x, const int8_t *weight, const float *row_scale,                \
                                          const float *column_scale, const float *bias, float *h, ptrdiff_t out,       \
                                          ptrdiff_t in)                                                                \
    {                                                                                                                  \
        floats sums[MR][TOKENS] = {{{0}}};                                                                             \
        float single[MR][TOKENS] = {{0}};                                                                              \
        ptrdiff_t k = 0;                                                                                               \
        for (; k + VLEN <= in; k += VLEN) {                                                                            \
            __builtin_prefetch(weight + MR * k + PREFETCH_BYTES);                                                      \
            floats many[TOKENS];                                                                                       \
            for (int t = 0; t < TOKENS; t++)                                                                           \
                many[t] = column_scale ? load(x + t * in + k) * load(column_scale + k) : load(x + t * in + k);         \
            for (int r = 0; r < MR; r++) {                                                                             \
                const floats w = widen(weight + r * in + k);                                                           \
                for (int t = 0; t < TOKENS; t++)                                                                       \
                    sums[r][t] += w * many[t];                                                                         \
            }                                                                                                          \
        }                                                                                                              \
        for (; k < in; k++)                                                                                            \
            for (int r = 0; r < MR; r++)                                                                               \
                for (int t = 0; t < TOKENS; t++)                                                                       \
                    single[r][t] += (float)weight[r * in + k] * x[t * in + k] * (column_scale ? column_scale[k] : 1);  \
        for (int r = 0; r < MR; r++)                                                                                   \
            for (int t = 0; t < TOKENS; t++) {                                                                         \
                for (int lane = 0; lane < VLEN; lane++)                                                                \
                    single[r][t] += sums[r][t][lane];                                                                  \
                h[t * out + r] = single[r][t] * row_scale[r] + (bias ? bias[r] : 0.0f);                                \
            }                                                                                                          \
    }
GEMV_TILE(4, 1)
GEMV_TILE(2, 4)
GEMV_TILE(1, 1)
GEMV_TILE(1, 4)

#define GEMV_RUN(MR, TOKENS)                                                                                           \
    gemv_tile_##MR##_##TOKENS(x + i * in, weight + j * in, row_scale + j, column_scale, bias ? bias + j : NULL,        \
                              h + i * out + j, out, in)

/* h = (x diag(column_scale) W8^T) diag(row_scale) + bias for x [n, in] and W8 [out, in]; column_scale and bias may
 * be NULL. */
void lk_gemv_w8(const float *x, const int8_t *weight, const float *row_scale, const float *column_scale, const float *bias,
                float *h, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in)
{
    PARALLEL_ROWS(out, in)
    for (ptrdiff_t four = 0; four < out; four += 4) {
        ptrdiff_t i = 0;
        for (; i + 4 <= n; i += 4) {
            ptrdiff_t j = four;
            for (; j + 2 <= out && j < four + 4; j += 2)
                GEMV_RUN(2, 4);
            for (; j < out && j < four + 4; j++)
                GEMV_RUN(1, 4);
        }
        for (; i < n; i++) {
            ptrdiff_t j = four;
            if (j + 4 <= out)
                GEMV_RUN(4, 1);
            else
                for (; j < out; j++)
                    GEMV_RUN(1, 1);
        }
    }
}
