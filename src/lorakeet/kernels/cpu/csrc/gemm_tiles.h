/* What the products of many tokens share: a tile of the result, and the instructions that sum products of small integers. */
#ifndef LORAKEET_TILES_H
#define LORAKEET_TILES_H

#include "common.h"
#if defined(__AVX2__)
#include <float.h>
#include <immintrin.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

/* Vectors of int32 sums. PLUS_PAIRS adds to each the products of two 16-bit neighbours, PLUS_FOURS those of four unsigned by
 * four signed bytes; in place, for the compiler would move each sum to another register and back. */
#if WIDTH == 16
typedef __m512i sums_of;
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define EVERY(v) _mm512_set1_epi32(v)
#define IN_FP32(sums) (floats)_mm512_cvtepi32_ps(sums)
#define LARGER(a, b) _mm512_max_epi32(a, b)
#define MAGNITUDE(v) _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(INT32_MAX))
#else
typedef __m256i sums_of;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define EVERY(v) _mm256_set1_epi32(v)
#define IN_FP32(sums) (floats)_mm256_cvtepi32_ps(sums)
#define LARGER(a, b) _mm256_max_epi32(a, b)
#define MAGNITUDE(v) _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(INT32_MAX))
#endif

#if defined(__AVX512VNNI__)
#define PLUS_PAIRS(sums, a, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b))
#define PLUS_FOURS(sums, a, b) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b))
#elif defined(__AVXVNNI__)
#define PLUS_PAIRS(sums, a, b) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b))
#define PLUS_FOURS(sums, a, b) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b))
#else
#define NO_DOTS
#define PLUS(sums, more) __asm__("vpaddd %1, %0, %0" : "+v"(sums) : "v"(more))
#if WIDTH == 16
#define PLUS_PAIRS(sums, a, b) PLUS(sums, _mm512_madd_epi16(a, b))
#else
#define PLUS_PAIRS(sums, a, b) PLUS(sums, _mm256_madd_epi16(a, b))
#endif
/* Exact, and slow: for the tests. */
#define PLUS_FOURS(sums, a, b) sums = fours(sums, a, b)
static inline sums_of fours(sums_of sums, sums_of a, sums_of b)
{
    int32_t each[WIDTH];
    uint8_t left[4 * WIDTH];
    int8_t right[4 * WIDTH];
    memcpy(each, &sums, sizeof each);
    memcpy(left, &a, sizeof left);
    memcpy(right, &b, sizeof right);
    for (int i = 0; i < 4 * WIDTH; i++)
        each[i / 4] += left[i] * right[i];
    memcpy(&sums, each, sizeof each);
    return sums;
}
#endif

enum {
    STRIP = WIDTH == 16 ? 12 : 6, /* rows of x in a tile: with these its sums fill most of the registers */
    PANEL = 2 * WIDTH,            /* columns of the result in a tile */
    LANES = 16                    /* what rounding takes from a value is given to the one so many further on */
};

/* Values of a row times their factors (or NULL: 1) in one vector, those from `left` on zeros. */
#if WIDTH == 16
typedef __m512 values;
static inline values some(const float *row, const float *factor, ptrdiff_t left)
{
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(mask, row);
    return factor ? _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, factor)) : v;
}
#else
typedef __m256 values;
static inline values some(const float *row, const float *factor, ptrdiff_t left)
{
    if (left >= 8)
        return factor ? _mm256_mul_ps(_mm256_loadu_ps(row), _mm256_loadu_ps(factor)) : _mm256_loadu_ps(row);
    float edge[8] = {0};
    for (ptrdiff_t e = 0; e < left; e++)
        edge[e] = factor ? row[e] * factor[e] : row[e];
    return _mm256_loadu_ps(edge);
}
#endif

/* Eight numbers of each of two neighbouring rows of a strip -> [number][row of the strip]. */
static inline void put_two(__m256i one, __m256i other, int32_t *to)
{
    const __m256i low = _mm256_unpacklo_epi32(one, other), high = _mm256_unpackhi_epi32(one, other);
    const __m128i four[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high), _mm256_extracti128_si256(low, 1),
                             _mm256_extracti128_si256(high, 1)};
    for (int q = 0; q < 4; q++) {
        _mm_storel_epi64((__m128i *)(to + 2 * q * STRIP), four[q]);
        _mm_storeh_pd((double *)(to + (2 * q + 1) * STRIP), _mm_castsi128_pd(four[q]));
    }
}

/* Sixteen bytes of a weight [out, in] from a row and a column on; zeros beyond its edges, where nothing is read. */
static inline __m128i sixteen_of(const int8_t *weight, ptrdiff_t out, ptrdiff_t in, ptrdiff_t row, ptrdiff_t column)
{
    const int8_t *from = weight + row * in + column;
    int8_t edge[16] = {0};
    if (row >= out || in - column < 16) {
        if (row < out && column < in)
            memcpy(edge, from, (size_t)(in - column));
        from = edge;
    }
    return _mm_loadu_si128((const __m128i *)from);
}

/* In how many parts the rows are taken, where there are few panels for the threads; each part packs its panels by itself. */
static inline ptrdiff_t row_parts(ptrdiff_t panels, ptrdiff_t n)
{
#if defined(_OPENMP)
    const ptrdiff_t wanted = (6 * omp_get_max_threads() + panels - 1) / panels, most = 1 + n / (10 * STRIP);
    return wanted < most ? wanted : most;
#else
    (void)panels, (void)n;
    return 1;
#endif
}
#endif
#endif
