/* Values of an NF4 weight: a table of sixteen, looked up in registers, times the scale of each 64 values.
 *
 * Layout and meaning: kernels/nf4/format.py. The functions need whole blocks in every row of the weight. */
#ifndef LORAKEET_NF4_H
#define LORAKEET_NF4_H

#include "common.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum {
    NF4_BLOCK = 64,        /* values that share a scale */
    NF4_SCALE_BLOCK = 256, /* scales that share a scale of their own */
    NF4_TABLE = 1,         /* where `nested` has its table of 256 values, */
    NF4_LARGEST = 257      /* and the scales of the scales */
};

/* A weight [out, in]: two codes a byte; the scales of its blocks are codes with `nested`, or fp32 if that is NULL. */
struct nf4_weight {
    const uint8_t *codes;
    const void *absmax;
    const float *nested;
    ptrdiff_t out, in;
};

static const float nf4_table[16] = {
    -1.0f,                -0.6961928009986877f,  -0.5250730514526367f,  -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f,  0.24611230194568634f,  0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f,   0.7229568362236023f,   1.0f};

/* The scale of a block. The product is rounded before the mean is added: that is what plain torch computes. */
static inline float nf4_scale(const struct nf4_weight *w, ptrdiff_t block)
{
    if (!w->nested)
        return ((const float *)w->absmax)[block];
    const uint8_t code = ((const uint8_t *)w->absmax)[block];
    float scale = w->nested[NF4_TABLE + code] * w->nested[NF4_LARGEST + block / NF4_SCALE_BLOCK];
    __asm__("" : "+m"(scale)); /* no fused multiply-add */
    return scale + w->nested[0];
}

/* The values of VLEN bytes, without their scale: those of the upper halves, which come first, and of the lower halves. */
static inline void nf4_pairs(const uint8_t *codes, floats *first, floats *second)
{
#if VLEN == 16
    const __m512 table = _mm512_loadu_ps(nf4_table);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    *first = (floats)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
    *second = (floats)_mm512_permutexvar_ps(bytes, table); /* reads the lower four bits */
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(nf4_table), high = _mm256_loadu_ps(nf4_table + 8);
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    const __m256i upper = _mm256_srli_epi32(bytes, 4);
    *first = (floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, upper), _mm256_permutevar8x32_ps(high, upper),
                                      _mm256_castsi256_ps(_mm256_slli_epi32(upper, 28)));
    *second = (floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, bytes), _mm256_permutevar8x32_ps(high, bytes),
                                       _mm256_castsi256_ps(_mm256_slli_epi32(bytes, 28)));
#else
    for (int lane = 0; lane < VLEN; lane++) {
        (*first)[lane] = nf4_table[codes[lane] >> 4];
        (*second)[lane] = nf4_table[codes[lane] & 15];
    }
#endif
}

/* 2 VLEN adjacent floats -> those at even places, and at odd ones. */
static inline void nf4_split(const float *x, floats *even, floats *odd)
{
    const floats low = load(x), high = load(x + VLEN);
#if VLEN == 16
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *even = (floats)_mm512_permutex2var_ps((__m512)low, places, (__m512)high);
    *odd = (floats)_mm512_permutex2var_ps((__m512)low, _mm512_add_epi32(places, _mm512_set1_epi32(1)), (__m512)high);
#elif defined(__AVX2__)
    const __m256 a = _mm256_shuffle_ps((__m256)low, (__m256)high, 0x88), b = _mm256_shuffle_ps((__m256)low, (__m256)high, 0xDD);
    *even = (floats)_mm256_permute4x64_pd((__m256d)a, 0xD8);
    *odd = (floats)_mm256_permute4x64_pd((__m256d)b, 0xD8);
#else
    for (int lane = 0; lane < VLEN; lane++) {
        (*even)[lane] = 2 * lane < VLEN ? low[2 * lane] : high[2 * lane - VLEN];
        (*odd)[lane] = 2 * lane < VLEN ? low[2 * lane + 1] : high[2 * lane + 1 - VLEN];
    }
#endif
}

/* The 2 VLEN values of VLEN bytes in order, times their scale. */
static inline void nf4_values(const uint8_t *codes, float scale, float *to)
{
    floats first, second;
    nf4_pairs(codes, &first, &second);
    first *= scale;
    second *= scale;
#if VLEN == 16
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_ps(to, _mm512_permutex2var_ps((__m512)first, low, (__m512)second));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps((__m512)first, high, (__m512)second));
#elif defined(__AVX2__)
    const __m256 a = _mm256_unpacklo_ps((__m256)first, (__m256)second);
    const __m256 b = _mm256_unpackhi_ps((__m256)first, (__m256)second);
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(a, b, 0x20));
    _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(a, b, 0x31));
#else
    for (int lane = 0; lane < VLEN; lane++) {
        to[2 * lane] = first[lane];
        to[2 * lane + 1] = second[lane];
    }
#endif
}
#endif
