/* What the files of compiled loops share. */
#ifndef LORAKEET_NATIVE_H
#define LORAKEET_NATIVE_H

#include <stddef.h>
#include <stdint.h>

/* A loop over `count` rows of `each` values is spread over threads where it is worth it. */
#define TEXT(x) #x
#define PRAGMA(x) _Pragma(TEXT(x))
#define OF_ROWS(count, each) PRAGMA(omp parallel for schedule(static) if ((count) * (each) > 32768))

void few_rows(const float *x, const int8_t *weight, const float *scale, const float *columns, const float *bias, float *h,
              ptrdiff_t n, ptrdiff_t out, ptrdiff_t in);

#endif
