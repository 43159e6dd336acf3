/* Operations of a training step between its products, in fp32, each in one pass over memory.
 *
 * Plain C: the compiler vectorises these loops. References: glu.py, rms_norm.py, rotary.py, dropout.py and
 * linear_cross_entropy.py.
 */
#include "common.h"

enum { SILU, GELU_TANH };

/* f(a) = a s(z(a)) with the logistic function s: z = a for SiLU, and for GELU's approximation by tanh, as
 * (1 + tanh(y)) / 2 = s(2y), z = 2 sqrt(2/pi) (a + 0.044715 a^3). */
static inline float logistic(float a, int kind)
{
    return 1.0f / (1.0f + exponential(kind == SILU ? -a : -1.59576912f * fmaf(0.044715f * a * a, a, a)));
}

/* f'(a) = s + a s (1 - s) z'(a) */
static inline float slope(float a, float s, int kind)
{
    return fmaf(a * s * (1.0f - s), kind == SILU ? 1.0f : 1.59576912f * fmaf(3.0f * 0.044715f * a, a, 1.0f), s);
}

/* A bfloat16 as fp32. */
static inline float wide_of(uint16_t narrow)
{
    union {
        uint32_t bits;
        float value;
    } wide = {(uint32_t)narrow << 16};
    return wide.value;
}

/* Round to bfloat16, ties to even; NaN stays NaN. */
static inline uint16_t narrow_of(float x)
{
    union {
        float value;
        uint32_t bits;
    } wide = {x};
    return (uint16_t)(x != x ? 0x7fc0 : (wide.bits + 0x7fff + (wide.bits >> 16 & 1)) >> 16);
}

static inline float itself(float x)
{
    return x;
}

/* Run a loop over i in [0, size), shared by threads in blocks of whole vectors. The last values of a share would be
 * computed without vectors, which may round otherwise, so the bits would depend on the number of threads. */
enum { ELEMENT_BLOCK = 4096 };
#define EACH_ELEMENT                                                                                                   \
    PRAGMA(omp parallel for schedule(static) if (size > 32768))                                                        \
    for (ptrdiff_t from = 0; from < size; from += ELEMENT_BLOCK)                                                       \
        for (ptrdiff_t i = from; i < min_of(from + ELEMENT_BLOCK, size); i++)
#define GATED(NAME, KIND)                                                                                              \
    static void NAME(const float *gate, const float *up, float *h, ptrdiff_t size)                                     \
    {                                                                                                                  \
        EACH_ELEMENT                                                                                                   \
            h[i] = gate[i] * logistic(gate[i], KIND) * up[i];                                                          \
    }
#define GATED_SAVING(NAME, KIND)                                                                                       \
    static void NAME(const float *gate, const float *up, float *h, uint16_t *bf16_gate, uint16_t *bf16_up, ptrdiff_t size) \
    {                                                                                                                  \
        EACH_ELEMENT {                                                                                                 \
            h[i] = gate[i] * logistic(gate[i], KIND) * up[i];                                                          \
            bf16_gate[i] = narrow_of(gate[i]);                                                                         \
            bf16_up[i] = narrow_of(up[i]);                                                                             \
        }                                                                                                              \
    }
#define GATED_BACKWARD(NAME, KIND, TYPE, WIDE)                                                                         \
    static void NAME(const float *grad, const TYPE *gate, const TYPE *up, float *dgate, float *dup, ptrdiff_t size)    \
    {                                                                                                                  \
        EACH_ELEMENT {                                                                                                 \
            const float a = WIDE(gate[i]), s = logistic(a, KIND), g = grad[i];                                         \
            dgate[i] = g * WIDE(up[i]) * slope(a, s, KIND);                                                            \
            dup[i] = g * a * s;                                                                                        \
        }                                                                                                              \
    }
GATED(silu, SILU)
GATED(gelu_tanh, GELU_TANH)
GATED_SAVING(silu_saving, SILU)
GATED_SAVING(gelu_tanh_saving, GELU_TANH)
GATED_BACKWARD(silu_backward, SILU, float, itself)
GATED_BACKWARD(gelu_tanh_backward, GELU_TANH, float, itself)
GATED_BACKWARD(silu_backward_narrow, SILU, uint16_t, wide_of)
GATED_BACKWARD(gelu_tanh_backward_narrow, GELU_TANH, uint16_t, wide_of)

/* h = f(gate) up, all [size]; gate and up as bfloat16 besides, unless bf16_gate and bf16_up are NULL. */
void lk_gated(const float *gate, const float *up, float *h, uint16_t *bf16_gate, uint16_t *bf16_up, ptrdiff_t size,
              int kind)
{
    if (bf16_gate)
        (kind == SILU ? silu_saving : gelu_tanh_saving)(gate, up, h, bf16_gate, bf16_up, size);
    else
        (kind == SILU ? silu : gelu_tanh)(gate, up, h, size);
}

/* dgate = f'(gate) up grad, dup = f(gate) grad, all [size]; gate and up are bfloat16 if `narrow`, else fp32. */
void lk_gated_backward(const float *grad, const void *gate, const void *up, float *dgate, float *dup, ptrdiff_t size,
                       int kind, int narrow)
{
    if (narrow)
        (kind == SILU ? silu_backward_narrow : gelu_tanh_backward_narrow)(grad, gate, up, dgate, dup, size);
    else
        (kind == SILU ? silu_backward : gelu_tanh_backward)(grad, gate, up, dgate, dup, size);
}

/* y = s x w, s = (mean(x^2) + eps)^(-1/2) for each row x [n, width]; w is weight + more. s [n] is kept. */
void lk_rms_norm(const float *x, const float *weight, float *y, float *s, ptrdiff_t n, ptrdiff_t width, float eps,
                 float more)
{
    PARALLEL_ROWS(n, width)
    for (ptrdiff_t i = 0; i < n; i++) {
        const float *from = x + i * width;
        float *to = y + i * width, squares = 0;
        for (ptrdiff_t k = 0; k < width; k++)
            squares += from[k] * from[k];
        const float each = s[i] = 1.0f / sqrtf(squares / (float)width + eps);
        for (ptrdiff_t k = 0; k < width; k++)
            to[k] = from[k] * each * (weight[k] + more);
    }
}

/* dx = s (t - s^2 x mean(t x)), t = w grad. */
void lk_rms_norm_backward(const float *grad, const float *x, const float *weight, const float *s, float *dx, ptrdiff_t n,
                          ptrdiff_t width, float more)
{
    PARALLEL_ROWS(n, width)
    for (ptrdiff_t i = 0; i < n; i++) {
        const float *g = grad + i * width, *from = x + i * width, each = s[i];
        float *to = dx + i * width, along = 0;
        for (ptrdiff_t k = 0; k < width; k++)
            along += g[k] * (weight[k] + more) * from[k];
        along *= each * each / (float)width;
        for (ptrdiff_t k = 0; k < width; k++)
            to[k] = each * (g[k] * (weight[k] + more) - along * from[k]);
    }
}

/* y = x cos + R(x) sin for x [tokens, heads, 2 half], R(x1, x2) = (-x2, x1); cos and sin [tokens, 2 half]. With `backward`
 * the gradient, x cos - R(x sin), rounded as torch's addcmul rounds it: plain torch computes it for other layouts. */
void lk_rotary(const float *x, const float *cos, const float *sin, float *y, ptrdiff_t tokens, ptrdiff_t heads,
               ptrdiff_t half, int backward)
{
    PARALLEL_ROWS(tokens, heads * half)
    for (ptrdiff_t t = 0; t < tokens; t++) {
        const float *c = cos + t * 2 * half, *first = sin + t * 2 * half, *second = first + half;
        for (ptrdiff_t h = 0; h < heads; h++) {
            const float *from = x + (t * heads + h) * 2 * half;
            float *to = y + (t * heads + h) * 2 * half;
            for (ptrdiff_t k = 0; k < half; k++) {
                const float a = from[k], b = from[half + k];
                to[k] = backward ? fmaf(b, second[k], a * c[k]) : a * c[k] - b * first[k];
                to[half + k] = backward ? fmaf(-a, first[k], b * c[half + k]) : b * c[half + k] + a * second[k];
            }
        }
    }
}

/* y = x m / (1 - p), or with `add` y + x m / (1 - p), for a mask m of which each value is 0 with probability levels /
 * 2^16: a hash of its index, from the two halves of a seed (after Wellons's lowbias32). */
void lk_dropout(const float *x, float *y, ptrdiff_t size, uint32_t low, uint32_t high, uint32_t levels, float scale,
                int add)
{
    EACH_ELEMENT {
        uint32_t hash = (uint32_t)i + low;
        hash = (hash ^ hash >> 16) * 0x7feb352du ^ high;
        hash = (hash ^ hash >> 15) * 0x846ca68bu;
        const float kept = (hash ^ hash >> 16) >> 16 < levels ? 0.0f : x[i] * scale;
        y[i] = add ? y[i] + kept : kept;
    }
}

/* losses [n] of rows z [n, width] at their targets: log sum exp(scale z) - scale z_target, scale > 0. With `gradient`, z is
 * overwritten by scale (softmax(scale z) - onehot(target)). A row stays in the L2 cache between passes. */
void lk_cross_entropy(float *z, const int64_t *targets, float *losses, ptrdiff_t n, ptrdiff_t width, float scale,
                      int gradient)
{
    PARALLEL_ROWS(n, width)
    for (ptrdiff_t i = 0; i < n; i++) {
        enum { RUN = 1024 }; /* terms that are added in fp32 before the sum goes on in fp64 */
        float *row = z + i * width, largest = row[0];
        const float right = row[targets[i]];
        double total = 0;
        for (ptrdiff_t k = 0; k < width; k++)
            largest = row[k] > largest ? row[k] : largest;
        for (ptrdiff_t from = 0; from < width; from += RUN) {
            const ptrdiff_t to = min_of(from + RUN, width);
            float sum = 0;
            for (ptrdiff_t k = from; k < to; k++) {
                const float each = exponential(scale * (row[k] - largest));
                sum += each;
                if (gradient)
                    row[k] = each;
            }
            total += (double)sum;
        }
        losses[i] = (float)log(total) - scale * (right - largest);
        if (!gradient)
            continue;
        const float share = (float)((double)scale / total);
        for (ptrdiff_t k = 0; k < width; k++)
            row[k] *= share;
        row[targets[i]] -= scale;
    }
}
