/* Activations rounded to int16 with one scale for each row: shared by the products of few and of many rows.
 *
 * Both split the depth into the same blocks and sum each block exactly in int32, so a row's result is the same in both. */
#ifndef LORAKEET_W8A16_H
#define LORAKEET_W8A16_H

#include "gemm_tiles.h"
#if defined(__AVX2__)

enum {
    W8A16_KC = 640,    /* depth of a block: its int32 sums cannot overflow, and a packed panel stays in the L1 cache */
    W8A16_PANELS = 2,  /* panels that a strip is multiplied with while it is in the L1 cache */
    W8A16_K_STEP = 16  /* depths are padded with zeros to a multiple of this */
};
_Static_assert(W8A16_KC % W8A16_K_STEP == 0, "a block holds whole steps");
_Static_assert((int)W8A16_K_STEP == (int)LK_FEEDBACK, "a16_round carries the error of one step to the next");

/* Size of the blocks of a depth: nearly equal ones, each a multiple of W8A16_K_STEP. */
static inline ptrdiff_t w8a16_kc(ptrdiff_t depth)
{
    const ptrdiff_t blocks = (depth + W8A16_KC - 1) / W8A16_KC, size = (depth + blocks - 1) / blocks;
    return (size + W8A16_K_STEP - 1) / W8A16_K_STEP * W8A16_K_STEP;
}

/* Largest code of a value before error feedback: a block's sums, with weights of 127, stay below 2^31. */
static inline float a16_limit(ptrdiff_t depth)
{
    const ptrdiff_t most = INT32_MAX / (127 * w8a16_kc(depth));
    return (float)((most < INT16_MAX ? most : INT16_MAX) - 1);
}

/* Round W8A16_K_STEP values of a row, times their factors and `times`, to int16; zeros from `left` on. Unless `feedback`
 * is NULL, the rounding errors stored there are added first, and the new ones replace them. */
static inline __m256i a16_round(const float *row, const float *factor, ptrdiff_t left, float times, float *feedback)
{
#if VLEN == 16
    __m512 v = _mm512_mul_ps(load_scaled(row, factor, left), _mm512_set1_ps(times));
    if (feedback)
        v = _mm512_add_ps(v, _mm512_loadu_ps(feedback));
    const __m512i code = _mm512_cvtps_epi32(v);
    if (feedback)
        _mm512_storeu_ps(feedback, _mm512_sub_ps(v, _mm512_cvtepi32_ps(code)));
    return _mm512_cvtsepi32_epi16(code);
#else
    __m256i half[2];
    for (int h = 0; h < 2; h++) {
        __m256 v = load_scaled(row + 8 * h, factor ? factor + 8 * h : NULL, left - 8 * h);
        v = _mm256_mul_ps(v, _mm256_set1_ps(times));
        if (feedback)
            v = _mm256_add_ps(v, _mm256_loadu_ps(feedback + 8 * h));
        half[h] = _mm256_cvtps_epi32(v);
        if (feedback)
            _mm256_storeu_ps(feedback + 8 * h, _mm256_sub_ps(v, _mm256_cvtepi32_ps(half[h])));
    }
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(half[0], half[1]), 0xD8);
#endif
}

/* The scale of a row: its largest magnitude over `most`; 1 for zeros, NaN if a value is not finite. The bits of fp32
 * magnitudes, read as integers, order as the values do, with infinity and NaN on top. */
static inline float a16_row_scale(const float *row, const float *factor, ptrdiff_t depth, float most)
{
    enum { CHAINS = 4 }; /* independent maxima, which hide the latency */
    int32_t each[CHAINS * VLEN], bits = 0;
    float largest;
    int32_vector m[CHAINS];
    for (int c = 0; c < CHAINS; c++)
        m[c] = BROADCAST(0);
    for (ptrdiff_t k = 0; k < depth; k += CHAINS * VLEN)
        for (int c = 0; c < CHAINS; c++) {
            const ptrdiff_t at = k + c * VLEN;
            m[c] = MAX_INT32(m[c], MAGNITUDE(load_scaled(row + at, factor ? factor + at : NULL, depth - at)));
        }
    memcpy(each, m, sizeof each);
    for (int e = 0; e < CHAINS * VLEN; e++)
        bits = each[e] > bits ? each[e] : bits;
    memcpy(&largest, &bits, sizeof largest);
    return !isfinite(largest) ? NAN : largest >= most * FLT_MIN ? largest / most : 1.0f;
}

/* Add a block's sums, times both scales, to a sum. The operations and their order are fixed here, since a compiler
 * could choose others in each loop. */
static inline floats a16_add(floats sum, int32_vector made, floats x_scale, floats scale)
{
    floats both = x_scale * scale;
    __asm__("" : "+v"(both));
#if defined(__FMA__) && VLEN == 16
    return (floats)_mm512_fmadd_ps((__m512)TO_FP32(made), (__m512)both, (__m512)sum);
#elif defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)TO_FP32(made), (__m256)both, (__m256)sum);
#else
    floats value = TO_FP32(made) * both;
    __asm__("" : "+v"(value));
    return sum + value;
#endif
}

enum { W8A16_CODE_STEP = 32 }; /* codes of a block of few rows are padded with zeros to a multiple of this */

/* Codes of a block of few rows, and of a whole row of `depth` values. */
static inline ptrdiff_t a16_block_codes(ptrdiff_t depth)
{
    return (w8a16_kc(depth) + W8A16_CODE_STEP - 1) / W8A16_CODE_STEP * W8A16_CODE_STEP;
}
static inline ptrdiff_t a16_row_codes(ptrdiff_t depth)
{
    const ptrdiff_t size = w8a16_kc(depth);
    return (depth + size - 1) / size * a16_block_codes(depth);
}

/* A product of few rows: h [n, out] = x W8^T + bias for rounded rows x [n, in] (gemv_w8a16.c). */
struct a16_product {
    const int16_t *codes; /* [n][a16_row_codes(in)] */
    const float *scale;   /* [n][4]: the scale of each row, four times */
    const int8_t *weight;
    const float *row_scale, *bias; /* bias may be NULL */
    float *h;
    ptrdiff_t out;
};

/* A range of memory that a thread needs after a product. */
struct a16_later {
    const void *from;
    ptrdiff_t bytes;
    int thread;
};

HIDDEN void a16_round_row(const float *x, const float *factor, int16_t *codes, float *scale, ptrdiff_t depth);
HIDDEN void a16_multiply(const struct a16_product *products, ptrdiff_t count, ptrdiff_t n, ptrdiff_t in,
                         const struct a16_later *later, ptrdiff_t ranges);

/* Products of many rows and their packing (gemm_w8a16.c), the same in tiles of AMX (gemm_amx.c), and of few rows. */
void lk_pack_a16(const float *x, const float *factor, int16_t *strips, float *scale, ptrdiff_t n, ptrdiff_t depth,
                 int error_feedback);
ptrdiff_t lk_packed_a16_size(ptrdiff_t n, ptrdiff_t depth);
ptrdiff_t lk_packed_a16_rows(ptrdiff_t n, ptrdiff_t depth);
void lk_gemm_w8a16(const int16_t *strips, const float *row_scale, const int8_t *weight, const float *scale,
                   const float *bias, const float *u, const float *v, ptrdiff_t rank, float *h, ptrdiff_t n,
                   ptrdiff_t out, ptrdiff_t in, int transposed);
void lk_pack_a16_amx(const float *x, const float *factor, int8_t *tiles, float *scale, ptrdiff_t n, ptrdiff_t depth,
                     int error_feedback);
ptrdiff_t lk_packed_a16_amx_size(ptrdiff_t n, ptrdiff_t depth);
void lk_gemm_w8a16_amx(const int8_t *tiles, const float *row_scale, const int8_t *weight, const float *scale,
                       const float *bias, const float *u, const float *v, ptrdiff_t rank, float *h, ptrdiff_t n,
                       ptrdiff_t out, ptrdiff_t in);
#endif
#endif
