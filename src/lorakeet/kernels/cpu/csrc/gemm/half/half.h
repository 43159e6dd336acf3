/* Values of a weight in 16 bits, widened to fp32 exactly: bf16 (the upper 16 bits of an fp32 number) or fp16. */
#ifndef LORAKEET_HALF_H
#define LORAKEET_HALF_H

#include "common.h"
#if defined(__AVX2__)
#include <immintrin.h>
#include <string.h>

static inline __attribute__((always_inline)) __m256 half_eight(const uint16_t *bits, const int bf16)
{
    const __m128i eight = _mm_loadu_si128((const __m128i *)bits);
    return bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16)) : _mm256_cvtph_ps(eight);
}

/* VLEN values. */
static inline __attribute__((always_inline)) floats half_load(const uint16_t *bits, const int bf16)
{
#if VLEN == 16
    const __m256i all = _mm256_loadu_si256((const __m256i *)bits);
    return (floats)(bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(all), 16)) : _mm512_cvtph_ps(all));
#else
    return (floats)half_eight(bits, bf16);
#endif
}

/* The first `count` of VLEN values, and zeros. */
static inline __attribute__((always_inline)) floats half_load_some(const uint16_t *bits, ptrdiff_t count, const int bf16)
{
    uint16_t edge[VLEN] = {0};
    if (count >= VLEN)
        return half_load(bits, bf16);
    if (count > 0)
        memcpy(edge, bits, (size_t)count * sizeof *bits);
    return half_load(edge, bf16);
}
#endif
#endif
