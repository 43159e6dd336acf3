/* Vectors, threads and the exponential, shared by all files. */
#ifndef LORAKEET_COMMON_H
#define LORAKEET_COMMON_H

#include "abi.h"
#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* Spread a loop over `count` rows of `each` values over threads; below 32768 values a fork costs more than it saves. */
#define TEXT(x) #x
#define PRAGMA(x) _Pragma(TEXT(x))
#define PARALLEL_ROWS(count, each) PRAGMA(omp parallel for schedule(static) if ((count) * (each) > 32768))

/* Shared by files of the library, and not exported. */
#define HIDDEN __attribute__((visibility("hidden")))

/* VLEN: floats in a vector of this processor. `unaligned` is the same vector at any address of a float. */
#if defined(__AVX512BW__)
#define VLEN 16
#else
#define VLEN 8
#endif
typedef float floats __attribute__((vector_size(4 * VLEN)));
typedef float unaligned __attribute__((vector_size(4 * VLEN), aligned(4)));

static inline ptrdiff_t min_of(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

static inline floats load(const float *x)
{
    return *(const unaligned *)x;
}

static inline void store(float *x, floats v)
{
    *(unaligned *)x = v;
}

/* e^x with an error of at most two ulp, in a form that the compiler vectorises: x = n log 2 + r, log 2 in two parts
 * (Cephes). x is clamped to -87 (2e-38) and 88 (2e38); NaN stays NaN. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = rintf(x * 1.44269504f);
    const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    float p = fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    union {
        uint32_t bits;
        float value;
    } power = {(uint32_t)((int32_t)n + 127) << 23};
    return (fmaf(p, r * r, r) + 1.0f) * power.value;
}

/* Defined in gemv_w8.c and gemv_nf4.c; decoder_layer.c calls them too. */
void lk_gemv_nf4(const float *x, const uint8_t *codes, const void *absmax, const float *nested, const float *bias, float *h,
                 ptrdiff_t n, ptrdiff_t out, ptrdiff_t in);
void lk_gemv_w8(const float *x, const int8_t *weight, const float *row_scale, const float *column_scale, const float *bias,
                float *h, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in);

#endif
