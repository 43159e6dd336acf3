/* The product of few fp32 tokens with a weight in 16 bits (GEMV): memory-bound, the weight is read once and widened in
 * registers.
 *
 * Reference: kernels/half_linear.py. */
#include "half.h"
#if defined(__AVX2__)

enum { HALF_PREFETCH = 2048 /* values: hardware prefetchers do not follow interleaved streams */ };

/* One tile of h: `rows` rows of the weight by `tokens` rows of x. All but the addresses are constants. */
static inline __attribute__((always_inline)) void half_tile(const float *x, const uint16_t *bits, const float *bias, float *h,
                                                            ptrdiff_t out, ptrdiff_t in, const int rows, const int tokens,
                                                            const int bf16)
{
    floats sums[4][4] = {{{0}}};
    ptrdiff_t k = 0;
    for (; k + VLEN <= in; k += VLEN) {
        __builtin_prefetch(bits + rows * k + HALF_PREFETCH);
        for (int r = 0; r < rows; r++) {
            const floats w = half_load(bits + r * in + k, bf16);
            for (int t = 0; t < tokens; t++)
                sums[r][t] += w * load(x + t * in + k);
        }
    }
    if (k < in) {
        for (int t = 0; t < tokens; t++) {
            float edge[VLEN] = {0};
            memcpy(edge, x + t * in + k, (size_t)(in - k) * sizeof *x);
            for (int r = 0; r < rows; r++)
                sums[r][t] += half_load_some(bits + r * in + k, in - k, bf16) * load(edge);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            float sum = 0;
            for (int lane = 0; lane < VLEN; lane++)
                sum += sums[r][t][lane];
            h[t * out + r] = sum + (bias ? bias[r] : 0.0f);
        }
}

#define HALF_TILE(rows, tokens) half_tile(x + i * in, bits + j * in, bias ? bias + j : NULL, h + i * out + j, out, in, rows, tokens, bf16)

static inline __attribute__((always_inline)) void half_gemv(const float *x, const uint16_t *bits, const float *bias, float *h,
                                                            ptrdiff_t n, ptrdiff_t out, ptrdiff_t in, const int bf16)
{
    PARALLEL_ROWS(out, in)
    for (ptrdiff_t four = 0; four < out; four += 4) {
        const ptrdiff_t end = min_of(four + 4, out);
        ptrdiff_t i = 0;
        for (; i + 4 <= n; i += 4) {
            ptrdiff_t j = four;
            for (; j + 2 <= end; j += 2)
                HALF_TILE(2, 4);
            for (; j < end; j++)
                HALF_TILE(1, 4);
        }
        for (; i < n; i++) {
            ptrdiff_t j = four;
            if (j + 4 <= end)
                HALF_TILE(4, 1);
            else
                for (; j < end; j++)
                    HALF_TILE(1, 1);
        }
    }
}

/* h [n, out] = x W^T + bias for x [n, in] and W [out, in] in bf16 or fp16; bias may be NULL. */
void lk_gemv_half(const float *x, const uint16_t *bits, const float *bias, float *h, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in,
                  int bf16)
{
    if (bf16)
        half_gemv(x, bits, bias, h, n, out, in, 1);
    else
        half_gemv(x, bits, bias, h, n, out, in, 0);
}
#endif
