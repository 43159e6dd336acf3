/* The end of a product with int16 activations: scales, bias and low-rank product, shared by gemm_w8a16.c and gemm_amx.c. */
#ifndef LORAKEET_W8A16_EPILOGUE_H
#define LORAKEET_W8A16_EPILOGUE_H

#include "w8a16.h"
#if defined(__AVX2__)

/* NR columns of h, of which `width` exist; beyond these are a scale of 1 and zeros. */
struct w8a16_columns {
    float scale[NR], bias[NR], v[LK_MAX_FUSED_RANK][NR];
    ptrdiff_t width;
};

/* The columns from j on of `count`, of scale and bias (each [count] or NULL) and v [rank, count]. */
static inline void w8a16_load_columns(struct w8a16_columns *to, const float *scale, const float *bias, const float *v,
                                      ptrdiff_t rank, ptrdiff_t j, ptrdiff_t count)
{
    to->width = min_of(count - j, NR);
    const size_t bytes = (size_t)to->width * sizeof(float);
    for (int c = 0; c < NR; c++) {
        to->scale[c] = 1;
        to->bias[c] = 0;
    }
    if (scale)
        memcpy(to->scale, scale + j, bytes);
    if (bias)
        memcpy(to->bias, bias + j, bytes);
    for (ptrdiff_t k = 0; k < rank; k++) {
        memset(to->v[k], 0, sizeof to->v[k]);
        memcpy(to->v[k], v + k * count + j, bytes);
    }
}

/* Add a block's sums of a row, times both scales, to h; the first block's, to the bias and u [rank] times v. */
static inline void w8a16_write(const int32_vector *made, float row_scale, const struct w8a16_columns *columns,
                               const float *u, ptrdiff_t rank, float *h, int first)
{
    float edge[NR], *to = columns->width == NR ? h : edge;
    const size_t bytes = (size_t)columns->width * sizeof(float);
    if (columns->width < NR && !first)
        memcpy(edge, h, bytes);
    for (int half = 0; half < 2; half++) {
        floats sum = first ? load(columns->bias + VLEN * half) : load(to + VLEN * half);
        for (ptrdiff_t k = 0; first && k < rank; k++)
            sum = multiply_add((floats){0} + u[k], load(columns->v[k] + VLEN * half), sum);
        const floats x_scale = (floats){0} + row_scale;
        store(to + VLEN * half, a16_add(sum, made[half], x_scale, load(columns->scale + VLEN * half)));
    }
    if (columns->width < NR)
        memcpy(h, edge, bytes);
}
#endif
#endif
