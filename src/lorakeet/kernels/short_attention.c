/* Attention of short samples that lie end to end in one row, forward and backward, in fp32.
 *
 * A sample's scores fit in the cache, so a few rows of them are made, turned into weights and used at once; keys and values
 * are transposed once for each sample. The slow truth is in attention.py.
 */
#include "native.h"
#include <string.h>

enum {
    ROWS = 4,      /* queries at a time */
    LONGEST = 256, /* positions of a sample */
    WIDEST = 128   /* values of a head */
};

/* Tensors [total, heads, dim]: values of one head lie side by side. */
struct heads {
    float *at;
    ptrdiff_t token, head; /* how far apart tokens and heads lie */
};

struct shape {
    ptrdiff_t heads, shared, dim; /* heads of q; of k and v; their width, a multiple of WIDTH */
    ptrdiff_t window;             /* 0: none */
    int causal;
    float scale;
};

static inline float *row_of(const struct heads *tensor, ptrdiff_t token, ptrdiff_t head)
{
    return tensor->at + token * tensor->token + head * tensor->head;
}

static inline ptrdiff_t whole(ptrdiff_t count)
{
    return (count + WIDTH - 1) / WIDTH * WIDTH;
}

/* The positions that i may see: from `from` to before `to`. */
static inline void seen_by(const struct shape *shape, ptrdiff_t i, ptrdiff_t length, ptrdiff_t *from, ptrdiff_t *to)
{
    const ptrdiff_t w = shape->window;
    const ptrdiff_t least = !w ? 0 : i + 1 - w - (shape->causal ? 0 : 1), most = !w ? length : i + w + 1;
    *from = least > 0 ? least : 0;
    *to = shape->causal ? i + 1 : most < length ? most : length;
}

/* The compiler would read both again for each use. */
#if defined(__x86_64__)
#define IN_REGISTERS(one, two) __asm__("" : "+x"(one), "+x"(two))
#else
#define IN_REGISTERS(one, two) ((void)0)
#endif

/* c [ROWS, width] = a [ROWS, depth] b [depth, width], width a multiple of WIDTH. */
static inline void multiply(const float *a, ptrdiff_t a_row, const float *b, ptrdiff_t b_row, ptrdiff_t depth, float *c,
                            ptrdiff_t c_row, ptrdiff_t width)
{
    ptrdiff_t j = 0;
    for (; j + 2 * WIDTH <= width; j += 2 * WIDTH) {
        floats sums[ROWS][2] = {{{0}}};
        for (ptrdiff_t k = 0; k < depth; k++) {
            floats left = load(b + k * b_row + j), right = load(b + k * b_row + j + WIDTH);
            IN_REGISTERS(left, right);
            for (int r = 0; r < ROWS; r++) {
                sums[r][0] += a[r * a_row + k] * left;
                sums[r][1] += a[r * a_row + k] * right;
            }
        }
        for (int r = 0; r < ROWS; r++) {
            store(c + r * c_row + j, sums[r][0]);
            store(c + r * c_row + j + WIDTH, sums[r][1]);
        }
    }
    if (j < width) {
        floats sums[ROWS] = {{0}};
        for (ptrdiff_t k = 0; k < depth; k++)
            for (int r = 0; r < ROWS; r++)
                sums[r] += a[r * a_row + k] * load(b + k * b_row + j);
        for (int r = 0; r < ROWS; r++)
            store(c + r * c_row + j, sums[r]);
    }
}

/* to [count, dim] += s [ROWS, count]^T rows [ROWS, dim]. */
static inline void add_products(const float *s, ptrdiff_t s_row, const float *rows, ptrdiff_t dim, ptrdiff_t count, float *to,
                                ptrdiff_t stride)
{
    for (ptrdiff_t d = 0; d < dim; d += WIDTH) {
        floats each[ROWS];
        for (int r = 0; r < ROWS; r++)
            each[r] = load(rows + r * dim + d);
        for (ptrdiff_t j = 0; j < count; j++) {
            floats sum = load(to + j * stride + d);
            for (int r = 0; r < ROWS; r++)
                sum += s[r * s_row + j] * each[r];
            store(to + j * stride + d, sum);
        }
    }
}

/* The head's values at `length` positions, transposed: [dim, whole(length)], zeros at the end of each row. */
static void transpose(const struct heads *from, ptrdiff_t start, ptrdiff_t length, ptrdiff_t head, ptrdiff_t dim, float *to)
{
    const ptrdiff_t width = whole(length);
    for (ptrdiff_t j = 0; j < length; j++) {
        const float *row = row_of(from, start + j, head);
        for (ptrdiff_t d = 0; d < dim; d++)
            to[d * width + j] = row[d];
    }
    for (ptrdiff_t d = 0; d < dim; d++)
        for (ptrdiff_t j = length; j < width; j++)
            to[d * width + j] = 0;
}

/* ROWS positions of a head from i on, times `factor`; zeros beyond the sample. */
static inline void gather(const struct heads *from, ptrdiff_t start, ptrdiff_t i, ptrdiff_t length, ptrdiff_t head,
                          ptrdiff_t dim, float factor, float *to)
{
    memset(to, 0, (size_t)(ROWS * dim) * sizeof(float));
    for (ptrdiff_t r = 0; r < ROWS && i + r < length; r++) {
        const float *row = row_of(from, start + i + r, head);
        for (ptrdiff_t d = 0; d < dim; d++)
            to[r * dim + d] = row[d] * factor;
    }
}

/* The columns from `from` to before `to` of a row that ends at `width`: what lies beside them becomes `value`. */
static inline void fill_beside(float *row, ptrdiff_t from, ptrdiff_t to, ptrdiff_t width, float value)
{
    for (ptrdiff_t j = 0; j < from; j++)
        row[j] = value;
    for (ptrdiff_t j = to; j < width; j++)
        row[j] = value;
}

/* The columns of scores, which start at `first`, that position i sees; none beyond the sample. */
static inline void seen_columns(const struct shape *shape, ptrdiff_t i, ptrdiff_t length, ptrdiff_t first, ptrdiff_t *from,
                                ptrdiff_t *to)
{
    *from = *to = first;
    if (i < length)
        seen_by(shape, i, length, from, to);
    *from -= first;
    *to -= first;
}

/* Scores [ROWS, width] -> weights not yet divided by their sum, 0 where nothing is seen; the sum and log sum exp of each. */
static inline void weigh(float *scores, ptrdiff_t first, ptrdiff_t width, const struct shape *shape, ptrdiff_t i,
                         ptrdiff_t length, float *sums, float *logs)
{
    for (ptrdiff_t r = 0; r < ROWS; r++) {
        float *s = scores + r * LONGEST, largest = -INFINITY, sum = 0;
        ptrdiff_t from, to;
        seen_columns(shape, i + r, length, first, &from, &to);
        fill_beside(s, from, to, width, -INFINITY);
        for (ptrdiff_t j = 0; j < width; j++)
            largest = s[j] > largest ? s[j] : largest;
        for (ptrdiff_t j = 0; j < width; j++) {
            s[j] = exponential(s[j] - largest);
            sum += s[j];
        }
        fill_beside(s, from, to, width, 0);
        sums[r] = sum;
        logs[r] = largest + logf(sum);
    }
}

/* The columns of scores that the queries from i on see together: from `first`, a multiple of WIDTH, `width` in whole vectors. */
static inline ptrdiff_t columns_of(const struct shape *shape, ptrdiff_t i, ptrdiff_t length, ptrdiff_t *first)
{
    ptrdiff_t none, last;
    const ptrdiff_t end = i + ROWS < length ? i + ROWS : length;
    seen_by(shape, i, length, first, &none);
    seen_by(shape, end - 1, length, &none, &last);
    *first = *first / WIDTH * WIDTH;
    return whole(last) - *first;
}

/* o [total, heads, dim] and log sum exp [total, heads] for samples that start at starts[n] and end before starts[n] +
 * lengths[n]; what belongs to no sample is left as it is. */
void short_attention(const struct heads *q, const struct heads *k, const struct heads *v, const struct heads *o, float *logs,
                     const int64_t *starts, const int64_t *lengths, ptrdiff_t samples, const struct shape *shape)
{
    const ptrdiff_t dim = shape->dim, serves = shape->heads / shape->shared;
#pragma omp parallel for schedule(dynamic) if (samples > 0)
    for (ptrdiff_t task = 0; task < samples * shape->heads; task++) {
        _Alignas(64) float keys[LONGEST * WIDEST], scores[ROWS * LONGEST], some[ROWS * WIDEST];
        const ptrdiff_t start = starts[task / shape->heads], length = lengths[task / shape->heads], row = whole(length);
        const ptrdiff_t head = task % shape->heads;
        transpose(k, start, length, head / serves, dim, keys);
        for (ptrdiff_t i = 0; i < length; i += ROWS) {
            float sums[ROWS], each[ROWS];
            ptrdiff_t first;
            const ptrdiff_t width = columns_of(shape, i, length, &first);
            const ptrdiff_t depth = first + width < length ? width : length - first;
            gather(q, start, i, length, head, dim, shape->scale, some);
            multiply(some, dim, keys + first, row, dim, scores, LONGEST, width);
            weigh(scores, first, width, shape, i, length, sums, each);
            multiply(scores, LONGEST, row_of(v, start + first, head / serves), v->token, depth, some, dim, dim);
            for (ptrdiff_t r = 0; r < ROWS && i + r < length; r++) {
                float *to = row_of(o, start + i + r, head);
                for (ptrdiff_t d = 0; d < dim; d++)
                    to[d] = some[r * dim + d] / sums[r];
                logs[(start + i + r) * shape->heads + head] = each[r];
            }
        }
    }
}

/* Gradients of the above, dq [total, heads, dim], dk and dv [total, shared, dim], from `grad` to o. */
void short_attention_backward(const struct heads *grad, const struct heads *q, const struct heads *k, const struct heads *v,
                              const struct heads *o, const float *logs, const struct heads *dq, const struct heads *dk,
                              const struct heads *dv, const int64_t *starts, const int64_t *lengths, ptrdiff_t samples,
                              const struct shape *shape)
{
    const ptrdiff_t dim = shape->dim, serves = shape->heads / shape->shared;
#pragma omp parallel for schedule(dynamic) if (samples > 0)
    for (ptrdiff_t task = 0; task < samples * shape->shared; task++) {
        _Alignas(64) float keys[LONGEST * WIDEST], values[LONGEST * WIDEST];
        _Alignas(64) float weights[ROWS * LONGEST], slopes[ROWS * LONGEST], some[ROWS * WIDEST], came[ROWS * WIDEST];
        _Alignas(64) float made[ROWS * WIDEST];
        const ptrdiff_t start = starts[task / shape->shared], length = lengths[task / shape->shared], row = whole(length);
        const ptrdiff_t group = task % shape->shared;
        transpose(k, start, length, group, dim, keys);
        transpose(v, start, length, group, dim, values);
        for (ptrdiff_t j = 0; j < length; j++) {
            memset(row_of(dk, start + j, group), 0, (size_t)dim * sizeof(float));
            memset(row_of(dv, start + j, group), 0, (size_t)dim * sizeof(float));
        }
        for (ptrdiff_t head = group * serves; head < (group + 1) * serves; head++)
            for (ptrdiff_t i = 0; i < length; i += ROWS) {
                ptrdiff_t first;
                const ptrdiff_t width = columns_of(shape, i, length, &first);
                const ptrdiff_t depth = first + width < length ? width : length - first;
                gather(q, start, i, length, head, dim, shape->scale, some);
                gather(grad, start, i, length, head, dim, 1.0f, came);
                multiply(some, dim, keys + first, row, dim, weights, LONGEST, width);
                multiply(came, dim, values + first, row, dim, slopes, LONGEST, width);
                for (ptrdiff_t r = 0; r < ROWS; r++) {
                    const ptrdiff_t at = i + r < length ? start + i + r : start + i;
                    const float *out = row_of(o, at, head), log_sum = logs[at * shape->heads + head];
                    float *p = weights + r * LONGEST, *ds = slopes + r * LONGEST, along = 0;
                    ptrdiff_t from, to;
                    seen_columns(shape, i + r, length, first, &from, &to);
                    for (ptrdiff_t d = 0; d < dim; d++)
                        along += out[d] * came[r * dim + d];
                    for (ptrdiff_t j = 0; j < width; j++) {
                        p[j] = exponential(p[j] - log_sum);
                        ds[j] = p[j] * (ds[j] - along);
                    }
                    fill_beside(p, from, to, width, 0);
                    fill_beside(ds, from, to, width, 0);
                }
                multiply(slopes, LONGEST, row_of(k, start + first, group), k->token, depth, made, dim, dim);
                for (ptrdiff_t r = 0; r < ROWS && i + r < length; r++)
                    for (ptrdiff_t d = 0; d < dim; d++)
                        row_of(dq, start + i + r, head)[d] = made[r * dim + d] * shape->scale;
                add_products(slopes, LONGEST, some, dim, depth, row_of(dk, start + first, group), dk->token);
                add_products(weights, LONGEST, came, dim, depth, row_of(dv, start + first, group), dv->token);
            }
    }
}
