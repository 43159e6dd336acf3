/* The 8-bit product of few tokens: the weight is read once, and is multiplied as it is read.
 *
 * Its slow truth is in int8.py.
 */
#include "common.h"
#include <math.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

static inline floats widen(const int8_t *w)
{
#if WIDTH == 16
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
#elif defined(__AVX2__)
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
#else
    floats wide;
    for (int lane = 0; lane < WIDTH; lane++)
        wide[lane] = w[lane];
    return wide;
#endif
}

/* Bytes: several rows that are read side by side are no stream that the processor would fetch ahead by itself. */
#define AHEAD 4096

/* One tile of h: ROWS of the weight by TOKENS of x. Both are constants, so the sums stay in registers. */
#define TILE(ROWS, TOKENS)                                                                                              \
    static void tile_##ROWS##_##TOKENS(const float *x, const int8_t *weight, const float *scale, const float *columns,   \
                                       const float *bias, float *h, ptrdiff_t out, ptrdiff_t in)                        \
    {                                                                                                                   \
        floats sums[ROWS][TOKENS] = {{{0}}};                                                                            \
        float single[ROWS][TOKENS] = {{0}};                                                                             \
        ptrdiff_t k = 0;                                                                                                \
        for (; k + WIDTH <= in; k += WIDTH) {                                                                           \
            __builtin_prefetch(weight + ROWS * k + AHEAD);                                                              \
            floats many[TOKENS];                                                                                        \
            for (int t = 0; t < TOKENS; t++)                                                                            \
                many[t] = columns ? load(x + t * in + k) * load(columns + k) : load(x + t * in + k);                    \
            for (int r = 0; r < ROWS; r++) {                                                                            \
                const floats w = widen(weight + r * in + k);                                                            \
                for (int t = 0; t < TOKENS; t++)                                                                        \
                    sums[r][t] += w * many[t];                                                                          \
            }                                                                                                           \
        }                                                                                                               \
        for (; k < in; k++)                                                                                             \
            for (int r = 0; r < ROWS; r++)                                                                              \
                for (int t = 0; t < TOKENS; t++)                                                                        \
                    single[r][t] += (float)weight[r * in + k] * x[t * in + k] * (columns ? columns[k] : 1);             \
        for (int r = 0; r < ROWS; r++)                                                                                  \
            for (int t = 0; t < TOKENS; t++) {                                                                          \
                for (int lane = 0; lane < WIDTH; lane++)                                                                \
                    single[r][t] += sums[r][t][lane];                                                                   \
                h[t * out + r] = single[r][t] * scale[r] + (bias ? bias[r] : 0.0f);                                     \
            }                                                                                                           \
    }
TILE(4, 1)
TILE(2, 4)
TILE(1, 1)
TILE(1, 4)

#define ROWS_OF(ROWS, TOKENS) \
    tile_##ROWS##_##TOKENS(x + i * in, weight + j * in, scale + j, columns, bias ? bias + j : NULL, h + i * out + j, out, in)

/* h = (x diag(columns) W8^T) diag(scale) + bias for few rows x [n, in]: the weight [out, in] is read once, a byte a value.
 * columns and bias may be NULL. */
void few_rows(const float *x, const int8_t *weight, const float *scale, const float *columns, const float *bias, float *h,
              ptrdiff_t n, ptrdiff_t out, ptrdiff_t in)
{
    OF_ROWS(out, in)
    for (ptrdiff_t four = 0; four < out; four += 4) {
        ptrdiff_t i = 0;
        for (; i + 4 <= n; i += 4) {
            ptrdiff_t j = four;
            for (; j + 2 <= out && j < four + 4; j += 2)
                ROWS_OF(2, 4);
            for (; j < out && j < four + 4; j++)
                ROWS_OF(1, 4);
        }
        for (; i < n; i++) {
            ptrdiff_t j = four;
            if (j + 4 <= out)
                ROWS_OF(4, 1);
            else
                for (; j < out; j++)
                    ROWS_OF(1, 1);
        }
    }
}
