/* Shared by the GEMMs: the register tile MR x NR, and instructions that sum products of small integers.
 *
 * Names as in BLIS: MR rows of x by NR columns of the result stay in registers; KC is the depth of a cache block. A strip
 * is MR packed rows of x, a panel NR packed columns of the weight. */
#ifndef LORAKEET_GEMM_TILES_H
#define LORAKEET_GEMM_TILES_H

#include "common.h"
#if defined(__AVX2__)
#include <float.h>
#include <immintrin.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

/* Threads of a parallel region, at most; those of this one; and the number of this thread in it. */
#if defined(_OPENMP)
#define most_threads() omp_get_max_threads()
#define team_threads() omp_get_num_threads()
#define own_thread() omp_get_thread_num()
#else
#define most_threads() 1
#define team_threads() 1
#define own_thread() 0
#endif

/* DOT_PAIRS adds to each int32 of `sums` the products of two adjacent int16 values, DOT_FOURS those of four unsigned by
 * four signed bytes. Assembly, in place: the compiler would copy each sum to another register and back. */
#if VLEN == 16
typedef __m512i int32_vector;
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define BROADCAST(v) _mm512_set1_epi32(v)
#define TO_FP32(sums) (floats)_mm512_cvtepi32_ps(sums)
#define MAX_INT32(a, b) _mm512_max_epi32(a, b)
#define MAGNITUDE(v) _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(INT32_MAX))
#else
typedef __m256i int32_vector;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define BROADCAST(v) _mm256_set1_epi32(v)
#define TO_FP32(sums) (floats)_mm256_cvtepi32_ps(sums)
#define MAX_INT32(a, b) _mm256_max_epi32(a, b)
#define MAGNITUDE(v) _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(INT32_MAX))
#endif

#if defined(__AVX512VNNI__)
#define DOT_PAIRS(sums, a, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b))
#define DOT_FOURS(sums, a, b) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b))
#elif defined(__AVXVNNI__)
#define DOT_PAIRS(sums, a, b) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b))
#define DOT_FOURS(sums, a, b) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b))
#else
#define NO_DOTS
#define ADD_INT32(sums, more) __asm__("vpaddd %1, %0, %0" : "+v"(sums) : "v"(more))
#if VLEN == 16
#define DOT_PAIRS(sums, a, b) ADD_INT32(sums, _mm512_madd_epi16(a, b))
#else
#define DOT_PAIRS(sums, a, b) ADD_INT32(sums, _mm256_madd_epi16(a, b))
#endif
/* Emulated where the instruction is missing: exact and slow, for the tests. */
#define DOT_FOURS(sums, a, b) sums = dot_fours_emulated(sums, a, b)
static inline int32_vector dot_fours_emulated(int32_vector sums, int32_vector a, int32_vector b)
{
    int32_t each[VLEN];
    uint8_t left[4 * VLEN];
    int8_t right[4 * VLEN];
    memcpy(each, &sums, sizeof each);
    memcpy(left, &a, sizeof left);
    memcpy(right, &b, sizeof right);
    for (int i = 0; i < 4 * VLEN; i++)
        each[i / 4] += left[i] * right[i];
    memcpy(&sums, each, sizeof each);
    return sums;
}
#endif

enum {
    MR = VLEN == 16 ? 12 : 6, /* rows of x in a tile: its sums fill most of the 32 (AVX2: 16) registers */
    NR = 2 * VLEN             /* columns of the result in a tile */
};
_Static_assert(MR % 2 == 0, "rows are packed two at a time");
_Static_assert(NR % 16 == 0, "weights are packed sixteen bytes at a time");

/* sum + a b, rounded once where the processor can: written out, as a compiler could choose otherwise in each loop. */
static inline floats multiply_add(floats a, floats b, floats sum)
{
#if defined(__FMA__) && VLEN == 16
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    floats product = a * b;
    __asm__("" : "+x"(product));
    return sum + product;
#endif
}

/* Load a vector of a row times its factors (or NULL: 1); zeros from `left` on. */
#if VLEN == 16
typedef __m512 fp32_vector;
static inline fp32_vector load_scaled(const float *row, const float *factor, ptrdiff_t left)
{
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(mask, row);
    return factor ? _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, factor)) : v;
}
#else
typedef __m256 fp32_vector;
static inline fp32_vector load_scaled(const float *row, const float *factor, ptrdiff_t left)
{
    if (left >= 8)
        return factor ? _mm256_mul_ps(_mm256_loadu_ps(row), _mm256_loadu_ps(factor)) : _mm256_loadu_ps(row);
    float edge[8] = {0};
    for (ptrdiff_t e = 0; e < left; e++)
        edge[e] = factor ? row[e] * factor[e] : row[e];
    return _mm256_loadu_ps(edge);
}
#endif

/* Sum the lanes of each of VLEN vectors: lane i of the result is the sum of vector i. ADD adds int32 or fp32 lanes. */
#if VLEN == 16
#define ADD_LANES_INT32(a, b) _mm512_add_epi32(a, b)
#define ADD_LANES_FP32(a, b) (__m512i)((floats)(a) + (floats)(b))
#define FOLD(name, ADD)                                                                                                \
    static inline int32_vector name(const int32_vector *s)                                                             \
    {                                                                                                                  \
        int32_vector four[4], two[2];                                                                                  \
        for (int i = 0; i < 4; i++) {                                                                                  \
            const int32_vector *v = s + 4 * i;                                                                         \
            const int32_vector a = ADD(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));          \
            const int32_vector b = ADD(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));          \
            four[i] = ADD(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));                                   \
        }                                                                                                              \
        for (int i = 0; i < 2; i++)                                                                                    \
            two[i] = ADD(_mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0x88),                                     \
                         _mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0xDD));                                    \
        return ADD(_mm512_shuffle_i32x4(two[0], two[1], 0x88), _mm512_shuffle_i32x4(two[0], two[1], 0xDD));            \
    }
#else
#define ADD_LANES_INT32(a, b) _mm256_add_epi32(a, b)
#define ADD_LANES_FP32(a, b) (__m256i)((floats)(a) + (floats)(b))
#define FOLD(name, ADD)                                                                                                \
    static inline int32_vector name(const int32_vector *s)                                                             \
    {                                                                                                                  \
        int32_vector two[2];                                                                                           \
        for (int i = 0; i < 2; i++) {                                                                                  \
            const int32_vector *v = s + 4 * i;                                                                         \
            const int32_vector a = ADD(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));          \
            const int32_vector b = ADD(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));          \
            two[i] = ADD(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));                                    \
        }                                                                                                              \
        return ADD(_mm256_permute2x128_si256(two[0], two[1], 0x20), _mm256_permute2x128_si256(two[0], two[1], 0x31));  \
    }
#endif
FOLD(fold_int32, ADD_LANES_INT32)
FOLD(fold_fp32, ADD_LANES_FP32)

/* Store eight int32 of each of two adjacent rows of a strip as [value][row of the strip]. */
static inline void store_two_rows(__m256i one, __m256i other, int32_t *to)
{
    const __m256i low = _mm256_unpacklo_epi32(one, other), high = _mm256_unpackhi_epi32(one, other);
    const __m128i four[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high), _mm256_extracti128_si256(low, 1),
                             _mm256_extracti128_si256(high, 1)};
    for (int q = 0; q < 4; q++) {
        _mm_storel_epi64((__m128i *)(to + 2 * q * MR), four[q]);
        _mm_storeh_pd((double *)(to + (2 * q + 1) * MR), _mm_castsi128_pd(four[q]));
    }
}

/* Load sixteen bytes of a weight [out, in] from a row and a column on; zeros beyond its edges, where nothing is read. */
static inline __m128i load_sixteen(const int8_t *weight, ptrdiff_t out, ptrdiff_t in, ptrdiff_t row, ptrdiff_t column)
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

/* Interleave four rows of sixteen bytes: [byte of a row][row]. */
static inline void interleave_four(const __m128i rows[4], int8_t *to)
{
    const __m128i a = _mm_unpacklo_epi8(rows[0], rows[1]), b = _mm_unpackhi_epi8(rows[0], rows[1]);
    const __m128i d = _mm_unpacklo_epi8(rows[2], rows[3]), e = _mm_unpackhi_epi8(rows[2], rows[3]);
    _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi16(a, d));
    _mm_storeu_si128((__m128i *)to + 1, _mm_unpackhi_epi16(a, d));
    _mm_storeu_si128((__m128i *)to + 2, _mm_unpacklo_epi16(b, e));
    _mm_storeu_si128((__m128i *)to + 3, _mm_unpackhi_epi16(b, e));
}

/* Number of parts that the rows are split into where there are few panels for the threads; each part packs its own panels. */
static inline ptrdiff_t row_parts(ptrdiff_t panels, ptrdiff_t n)
{
    const ptrdiff_t wanted = (6 * most_threads() + panels - 1) / panels, most = 1 + n / (10 * MR);
    return wanted < most ? wanted : most;
}
#endif
#endif
