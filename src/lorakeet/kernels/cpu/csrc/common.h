/* What the files of compiled loops share. */
#ifndef LORAKEET_NATIVE_H
#define LORAKEET_NATIVE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* A loop over `count` rows of `each` values is spread over threads where it is worth it. */
#define TEXT(x) #x
#define PRAGMA(x) _Pragma(TEXT(x))
#define OF_ROWS(count, each) PRAGMA(omp parallel for schedule(static) if ((count) * (each) > 32768))

/* Vectors of the width that the processor has. */
#if defined(__AVX512BW__)
#define WIDTH 16
#else
#define WIDTH 8
#endif
typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef float anywhere __attribute__((vector_size(4 * WIDTH), aligned(4)));

static inline ptrdiff_t least(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

static inline floats load(const float *x)
{
    return *(const anywhere *)x;
}

static inline void store(float *x, floats v)
{
    *(anywhere *)x = v;
}

/* e^x to two units of rounding, so that the compiler can make vectors of it: x = n log 2 + r, log 2 in two parts (Cephes).
 * Below -87 it stays at 2e-38, above 88 at 2e38; NaN stays NaN. */
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

void few_rows(const float *x, const int8_t *weight, const float *scale, const float *columns, const float *bias, float *h,
              ptrdiff_t n, ptrdiff_t out, ptrdiff_t in);

#endif
