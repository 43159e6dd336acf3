/* Gradients rounded to int8 with one scale for each group of a row: shared by gemm_w8a8_grouped.c and gemm_amx.c. */
#ifndef LORAKEET_W8A8_GROUPED_H
#define LORAKEET_W8A8_GROUPED_H

#include "gemm_tiles.h"
#if defined(__AVX2__)

enum { GROUPED_KC = 2048 }; /* depth of a block: a packed panel stays in the L2 cache */
_Static_assert(GROUPED_KC % LK_GROUP == 0, "a block holds whole groups");
_Static_assert(LK_GROUP % LK_FEEDBACK == 0 && LK_FEEDBACK == 16, "grouped_round carries the errors of sixteen values on");

static inline ptrdiff_t groups_of(ptrdiff_t depth)
{
    return (depth + LK_GROUP - 1) / LK_GROUP;
}

/* The scale of a group whose largest magnitude has these bits, and its inverse: 1 and 0 for zeros, NaN and 0 if a value is
 * not finite. The bits of fp32 magnitudes, read as integers, order as the values do, with infinity and NaN on top. */
static inline float grouped_scale(int32_t bits, float *inverse)
{
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    *inverse = 0.0f;
    if (bits >= 0x7f800000)
        return NAN;
    if (largest < 127.0f * FLT_MIN)
        return 1.0f;
    *inverse = 127.0f / largest;
    return largest / 127.0f;
}

/* Round LK_GROUP values of a row, times their factors, to int8. `left` of them are in memory, the others are zeros. Writes
 * their scale and the start of their sums too. Unless `feedback` is NULL, the rounding error of a value is added to the one
 * LK_FEEDBACK further on: the first LK_FEEDBACK values read the errors of the group before, the last ones store theirs. */
static inline __attribute__((always_inline)) void grouped_round(const float *row, const float *factor, ptrdiff_t left,
                                                                int32_t *codes, float *scale, int32_t *start,
                                                                float *feedback)
{
    float inverse;
#if VLEN == 16
    const __m512i highest = _mm512_set1_epi32(127), lowest = _mm512_set1_epi32(-128); /* NaN converts to INT32_MIN */
    __m512 v[LK_GROUP / 16], lost = _mm512_setzero_ps();
    __m128i bytes[LK_GROUP / 16];
    __m512i most = _mm512_setzero_si512(), sum = most;
    for (int q = 0; q < LK_GROUP / 16; q++) {
        v[q] = load_scaled(row + 16 * q, factor ? factor + 16 * q : NULL, left - 16 * q);
        if (feedback && q == 0)
            v[q] = _mm512_add_ps(v[q], _mm512_loadu_ps(feedback));
        most = MAX_INT32(most, MAGNITUDE(v[q]));
    }
    *scale = grouped_scale(_mm512_reduce_max_epi32(most), &inverse);
    for (int q = 0; q < LK_GROUP / 16; q++) {
        if (feedback && q > 0)
            v[q] = _mm512_add_ps(v[q], lost);
        const __m512i wanted = _mm512_cvtps_epi32(_mm512_mul_ps(v[q], _mm512_set1_ps(inverse)));
        const __m512i code = _mm512_max_epi32(_mm512_min_epi32(wanted, highest), lowest);
        lost = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(*scale), v[q]);
        bytes[q] = _mm512_cvtsepi32_epi8(code);
        sum = _mm512_add_epi32(sum, code);
    }
    for (int q = 0; q < LK_GROUP / 32; q++) /* as wide as the loads that follow: these would wait for narrower ones */
        _mm256_storeu_si256((__m256i *)codes + q, _mm256_set_m128i(bytes[2 * q + 1], bytes[2 * q]));
    if (feedback)
        _mm512_storeu_ps(feedback, lost);
    *start = -128 * _mm512_reduce_add_epi32(sum);
#else
    float v[LK_GROUP], lost[LK_FEEDBACK];
    int32_t most = 0, sum = 0;
    int8_t made[LK_GROUP];
    for (ptrdiff_t k = 0; k < LK_GROUP; k++) {
        int32_t bits;
        v[k] = k >= left ? 0.0f : factor ? row[k] * factor[k] : row[k];
        v[k] += feedback && k < LK_FEEDBACK ? feedback[k] : 0.0f;
        memcpy(&bits, v + k, sizeof bits);
        bits &= INT32_MAX;
        most = bits > most ? bits : most;
    }
    *scale = grouped_scale(most, &inverse);
    for (int q = 0; q < LK_GROUP; q += LK_FEEDBACK)
        for (int k = q; k < q + LK_FEEDBACK; k++) {
            const float value = feedback && q ? v[k] + lost[k - q] : v[k],
                wanted = inverse > 0 ? rintf(value * inverse) : 0.0f;
            const int32_t code = (int32_t)(wanted > 127.0f ? 127.0f : wanted < -127.0f ? -127.0f : wanted);
            lost[k - q] = fmaf((float)-code, *scale, value);
            made[k] = (int8_t)code;
            sum += code;
        }
    if (feedback)
        memcpy(feedback, lost, sizeof lost);
    memcpy(codes, made, sizeof made);
    *start = -128 * sum;
#endif
}

/* Add a group's sums of a row, times its scale, to its total. */
static inline floats grouped_add(floats total, int32_vector made, float scale)
{
    return multiply_add(TO_FP32(made), (floats){0} + scale, total);
}

/* Write a block's sums of a row, times the scales of its columns, to dx; all but the first block's are added. */
static inline void grouped_write(const float *sums, const float *scale, float *dx, ptrdiff_t width, int first)
{
    float edge[NR] = {0}, *to = width < NR ? edge : dx;
    if (width < NR && !first)
        memcpy(edge, dx, (size_t)width * sizeof(float));
    for (int c = 0; c < NR; c += VLEN)
        store(to + c, multiply_add(load(sums + c), load(scale + c), first ? (floats){0} : load(to + c)));
    if (width < NR)
        memcpy(dx, edge, (size_t)width * sizeof(float));
}

/* The product and its packing (gemm_w8a8_grouped.c). */
ptrdiff_t lk_packed_a8_groups(ptrdiff_t n, ptrdiff_t depth);
void lk_pack_a8_grouped(const float *x, const float *factor, int8_t *codes, float *scale, int32_t *start, ptrdiff_t n,
                        ptrdiff_t depth, int error_feedback);
void lk_gemm_w8a8_grouped_dgrad(const int8_t *codes, const float *row_scale, const int32_t *start, const int8_t *weight,
                                const float *scale, float *dx, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in);
#endif
#endif
