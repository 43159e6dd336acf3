/* A linear layer in training, and the loops that a decoder layer in training is made of. */
#ifndef LORAKEET_TRAINING_H
#define LORAKEET_TRAINING_H

#include "../gemm/w8a16.h"
#include "../gemm/w8a8_grouped.h"
#if defined(__AVX2__)
#include <time.h>

enum { Q, K, V, O, GATE, UP, DOWN };

/* Kinds of work. */
enum { PRODUCT, GRADIENT, ROUNDING, LOW_RANK, ATTENTION, ELEMENTWISE };
_Static_assert(ELEMENTWISE + 1 == LK_WORK, "a time for each kind");

static inline double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static inline void start_laps(double *seconds)
{
    if (seconds)
        seconds[LK_WORK] = now();
}

/* Add the time since the lap before to seconds[kind], unless `seconds` is NULL; seconds[LK_WORK] is the clock. */
static inline void lap(double *seconds, int kind)
{
    if (!seconds)
        return;
    const double time = now();
    seconds[kind] += time - seconds[LK_WORK];
    seconds[LK_WORK] = time;
}

/* Memory that is given out from the front; without a base only counted. */
struct arena {
    float *base;
    ptrdiff_t used;
};

/* The next `count` floats, at a multiple of 64 bytes from the base. */
static inline float *take(struct arena *arena, ptrdiff_t count)
{
    float *given = arena->base ? arena->base + arena->used : NULL;
    arena->used += (count + 15) / 16 * 16;
    return given;
}

/* Workspace of the products of a linear layer. */
struct linear_scratch {
    float *wide;   /* [n, widest input]: an input after dropout, or what the update adds to its gradient */
    float *thin;   /* [n, rank + outliers]: low-rank tokens */
    float *turned; /* [rank, n]: the same, transposed */
    float *across; /* [rank + outliers, widest output]: B and outlier columns, or the gradient to B, transposed */
    float *scale;  /* [n]: of a rounded input */
    float *packed; /* an input or a gradient, packed */
    double *seconds; /* as in lk_training_layer */
};

HIDDEN struct linear_scratch take_linear_scratch(struct arena *arena, const struct lk_training_layer *layer);
HIDDEN void trained_linear(const struct lk_trained_linear *layer, const float *x, float *u, float *h, ptrdiff_t n,
                           const struct linear_scratch *scratch);
HIDDEN void trained_linear_backward(const struct lk_trained_linear *layer, const float *g, const float *x,
                                    const float *u, float *dx, ptrdiff_t n, const struct linear_scratch *scratch);

/* Whether A or B of a layer gets a gradient. */
static inline int wants_gradient(const struct lk_trained_linear *layer)
{
    return layer->da || layer->db;
}

/* elementwise.c */
void lk_gated(const float *gate, const float *up, float *h, uint16_t *bf16_gate, uint16_t *bf16_up, ptrdiff_t size,
              int kind);
void lk_gated_backward(const float *grad, const void *gate, const void *up, float *dgate, float *dup, ptrdiff_t size,
                       int kind, int narrow);
void lk_rms_norm(const float *x, const float *weight, float *y, float *s, ptrdiff_t n, ptrdiff_t width, float eps,
                 float more);
void lk_rms_norm_backward(const float *grad, const float *x, const float *weight, const float *s, float *dx,
                          ptrdiff_t n, ptrdiff_t width, float more);
void lk_rotary(const float *x, const float *cos, const float *sin, float *y, ptrdiff_t tokens, ptrdiff_t heads,
               ptrdiff_t half, int backward);
void lk_dropout(const float *x, float *y, ptrdiff_t size, uint32_t low, uint32_t high, uint32_t levels, float scale,
                int add);
/* attention.c */
void lk_attention_forward(const struct lk_heads *q, const struct lk_heads *k, const struct lk_heads *v,
                          const struct lk_heads *o, float *logs, const int64_t *starts, const int64_t *lengths,
                          ptrdiff_t samples, const struct lk_attention *shape);
void lk_attention_backward(const struct lk_heads *grad, const struct lk_heads *q, const struct lk_heads *k,
                           const struct lk_heads *v, const struct lk_heads *o, const float *logs,
                           const struct lk_heads *dq, const struct lk_heads *dk, const struct lk_heads *dv,
                           const int64_t *starts, const int64_t *lengths, ptrdiff_t samples,
                           const struct lk_attention *shape);
/* gemm/ */
ptrdiff_t lk_packed_f32_size(ptrdiff_t n);
void lk_gemm_f32(const float *x, const float *m, const float *bias, float *strips, float *h, ptrdiff_t n,
                 ptrdiff_t depth, ptrdiff_t columns, int transposed, int low_rank, int add);
void lk_gemm_half(const float *x, const uint16_t *bits, const float *bias, float *strips, float *h, ptrdiff_t n,
                  ptrdiff_t depth, ptrdiff_t columns, int transposed, int bf16);
ptrdiff_t lk_packed_a8_amx_groups(ptrdiff_t n, ptrdiff_t depth);
void lk_pack_a8_amx(const float *x, const float *factor, int8_t *tiles, float *scale, ptrdiff_t n, ptrdiff_t depth,
                    int error_feedback);
void lk_gemm_w8a8_amx_dgrad(const int8_t *tiles, const float *row_scale, const int8_t *weight, const float *scale,
                            float *dx, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in);
void lk_outlier_dgrad(const float *g, const float *value, const float *position, float *dx, ptrdiff_t n, ptrdiff_t out,
                      ptrdiff_t in, ptrdiff_t outliers);
#endif
#endif
