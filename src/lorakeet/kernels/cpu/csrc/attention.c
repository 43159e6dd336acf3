/* Attention of samples that lie end to end in one row, forward and backward, in fp32.
 *
 * A block of keys and values at a time is laid out in panels that a few queries are multiplied with; their scores are used
 * while they are in the cache, and weights are put right when a later block has a larger score (Dao et al. 2022,
 * arXiv:2205.14135). The slow truth is in attention.py.
 */
#include "common.h"
#include <string.h>

enum {
    ROWS = WIDTH == 16 ? 8 : 4, /* queries at a time: eight sums of a vector each */
    PANEL = 16,                 /* columns side by side */
    KEYS = 256,                 /* keys at a time, and queries whose sums are kept */
    WIDEST = 128                /* values of a head */
};

/* Tensors [total, heads, dim]: values of one head lie side by side. */
struct heads {
    float *at;
    ptrdiff_t token, head; /* how far apart tokens and heads lie */
};

struct shape {
    ptrdiff_t heads, shared, dim; /* heads of q; of k and v; their width, a multiple of PANEL */
    ptrdiff_t window;             /* 0: none */
    int causal;
    float scale;
};

/* One head of one sample. */
struct place {
    ptrdiff_t start, length, head, shared;
};

/* The block of keys that a few queries are multiplied with: its first key and how many, and what of it they see together, in
 * whole panels. */
struct block {
    ptrdiff_t key, count, from, to;
};

static inline float *row_of(const struct heads *tensor, ptrdiff_t token, ptrdiff_t head)
{
    return tensor->at + token * tensor->token + head * tensor->head;
}

static inline struct place place_of(const int64_t *starts, const int64_t *lengths, const struct shape *shape, ptrdiff_t task)
{
    const ptrdiff_t sample = task / shape->heads, head = task % shape->heads;
    return (struct place){starts[sample], lengths[sample], head, head / (shape->heads / shape->shared)};
}

/* The positions that i may see: from `from` to before `to`. */
static inline void seen_by(const struct shape *shape, ptrdiff_t i, ptrdiff_t length, ptrdiff_t *from, ptrdiff_t *to)
{
    const ptrdiff_t w = shape->window;
    const ptrdiff_t first = !w ? 0 : i - w + (shape->causal ? 1 : 0);
    *from = first > 0 ? first : 0;
    *to = shape->causal ? i + 1 : least(length, w ? i + w + 1 : length);
}

/* Whether the queries from i on, ROWS at most and before `end`, see anything of the block, and what of it. */
static inline int see(const struct shape *shape, ptrdiff_t i, ptrdiff_t end, ptrdiff_t length, struct block *block)
{
    ptrdiff_t first, last, none;
    seen_by(shape, i, length, &first, &none);
    seen_by(shape, least(i + ROWS, end) - 1, length, &none, &last);
    first = first > block->key ? first - block->key : 0;
    last = least(last - block->key, block->count);
    block->from = first / PANEL * PANEL;
    block->to = (last + PANEL - 1) / PANEL * PANEL;
    return first < last;
}

/* The columns of a block that position i sees, counted from its first key; none from `end` on. */
static inline void seen_columns(const struct shape *shape, ptrdiff_t i, ptrdiff_t end, ptrdiff_t length,
                                const struct block *block, ptrdiff_t *from, ptrdiff_t *to)
{
    *from = *to = block->from;
    if (i >= end)
        return;
    seen_by(shape, i, length, from, to);
    *from = *from - block->key > block->from ? least(*from - block->key, block->to) : block->from;
    *to = least(*to - block->key, least(block->count, block->to));
    *to = *to > *from ? *to : *from;
}

/* The compiler would read it again for each use. */
#if defined(__AVX__)
#define IN_REGISTER(vector) __asm__("" : "+x"(vector))
#else
#define IN_REGISTER(vector) ((void)0)
#endif
#define VECTORS (PANEL / WIDTH)

/* c [ROWS, PANEL] of each of `panels` = a [ROWS, depth] b [panel][deep][PANEL]. */
static inline void multiply(const float *a, ptrdiff_t a_row, const float *b, ptrdiff_t deep, ptrdiff_t depth, float *c,
                            ptrdiff_t c_row, ptrdiff_t panels)
{
    for (ptrdiff_t p = 0; p < panels; p++, b += deep * PANEL, c += PANEL) {
        floats sums[ROWS][VECTORS] = {{{0}}};
        for (ptrdiff_t k = 0; k < depth; k++) {
            floats each[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                each[v] = load(b + k * PANEL + v * WIDTH);
                IN_REGISTER(each[v]);
            }
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    sums[r][v] += a[r * a_row + k] * each[v];
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                store(c + r * c_row + v * WIDTH, sums[r][v]);
    }
}

/* to [panel][KEYS][PANEL] += s [ROWS, count]^T rows [ROWS, dim]. */
static inline void add_products(const float *s, const float *rows, ptrdiff_t dim, ptrdiff_t count, float *to)
{
    for (ptrdiff_t d = 0; d < dim; d += WIDTH) {
        float *at = to + d / PANEL * KEYS * PANEL + d % PANEL;
        floats each[ROWS];
        for (int r = 0; r < ROWS; r++)
            each[r] = load(rows + r * dim + d);
        for (ptrdiff_t j = 0; j < count; j++) {
            floats sum = load(at + j * PANEL);
            for (int r = 0; r < ROWS; r++)
                sum += s[r * KEYS + j] * each[r];
            store(at + j * PANEL, sum);
        }
    }
}

/* `count` positions of a head from `first` on -> [position / PANEL][dim][PANEL]; zeros in the last panel. */
static void pack_transposed(const struct heads *from, ptrdiff_t first, ptrdiff_t count, ptrdiff_t head, ptrdiff_t dim, float *to)
{
    if (count % PANEL)
        memset(to + count / PANEL * dim * PANEL, 0, (size_t)(dim * PANEL) * sizeof(float));
    for (ptrdiff_t j = 0; j < count; j++) {
        const float *row = row_of(from, first + j, head);
        float *at = to + j / PANEL * dim * PANEL + j % PANEL;
        for (ptrdiff_t d = 0; d < dim; d++)
            at[d * PANEL] = row[d];
    }
}

/* `count` positions of a head from `first` on -> [dim / PANEL][KEYS][PANEL]; with `back` the other way. */
static void pack(const struct heads *rows, ptrdiff_t first, ptrdiff_t count, ptrdiff_t head, ptrdiff_t dim, float *panels,
                 int back)
{
    for (ptrdiff_t j = 0; j < count; j++)
        for (ptrdiff_t d = 0; d < dim; d += PANEL) {
            float *row = row_of(rows, first + j, head) + d, *at = panels + (d / PANEL * KEYS + j) * PANEL;
            memcpy(back ? row : at, back ? at : row, PANEL * sizeof(float));
        }
}

/* ROWS positions of a head from i on, times `factor`; zeros beyond the sample. */
static inline void gather(const struct heads *from, const struct place *place, ptrdiff_t i, ptrdiff_t dim, float factor, float *to)
{
    memset(to, 0, (size_t)(ROWS * dim) * sizeof(float));
    for (ptrdiff_t r = 0; r < ROWS && i + r < place->length; r++) {
        const float *row = row_of(from, place->start + i + r, place->head);
        for (ptrdiff_t d = 0; d < dim; d++)
            to[r * dim + d] = row[d] * factor;
    }
}

/* What lies in a block's columns beside those from `from` to before `to` becomes `value`. */
static inline void fill_beside(float *row, const struct block *block, ptrdiff_t from, ptrdiff_t to, float value)
{
    for (ptrdiff_t j = block->from; j < from; j++)
        row[j] = value;
    for (ptrdiff_t j = to; j < block->to; j++)
        row[j] = value;
}

/* Scores of one query -> e^(score - largest), 0 where nothing is seen; `largest` and `sum` go on over the blocks. What was summed
 * before is to be multiplied by the value returned. */
static inline float weigh(float *s, const struct block *block, ptrdiff_t from, ptrdiff_t to, float *largest, float *sum)
{
    float most = *largest, more = 0;
    if (from == to) {
        fill_beside(s, block, from, to, 0);
        return 1;
    }
    fill_beside(s, block, from, to, -INFINITY);
    for (ptrdiff_t j = block->from; j < block->to; j++)
        most = s[j] > most ? s[j] : most;
    for (ptrdiff_t j = block->from; j < block->to; j++) {
        s[j] = exponential(s[j] - most);
        more += s[j];
    }
    fill_beside(s, block, from, to, 0);
    const float factor = *sum != 0 ? exponential(*largest - most) : 0;
    *sum = *sum * factor + more;
    *largest = most;
    return factor;
}

/* o [total, heads, dim] and log sum exp [total, heads] for samples that start at starts[n] and end before starts[n] +
 * lengths[n]. */
void cpu_attention(const struct heads *q, const struct heads *k, const struct heads *v, const struct heads *o, float *logs,
                       const int64_t *starts, const int64_t *lengths, ptrdiff_t samples, const struct shape *shape)
{
    const ptrdiff_t dim = shape->dim;
#pragma omp parallel for schedule(dynamic)
    for (ptrdiff_t task = 0; task < samples * shape->heads; task++) {
        _Alignas(64) float keys[KEYS * WIDEST], values[KEYS * WIDEST], scores[ROWS * KEYS], some[ROWS * WIDEST];
        float sums[KEYS], largest[KEYS];
        const struct place place = place_of(starts, lengths, shape, task);
        for (ptrdiff_t top = 0; top < place.length; top += KEYS) {
            const ptrdiff_t bottom = least(top + KEYS, place.length);
            ptrdiff_t none, first, last;
            seen_by(shape, top, place.length, &first, &none);
            seen_by(shape, bottom - 1, place.length, &none, &last);
            for (ptrdiff_t i = 0; i < KEYS; i++) {
                sums[i] = 0;
                largest[i] = -INFINITY;
            }
            for (ptrdiff_t i = top; i < bottom; i++)
                memset(row_of(o, place.start + i, place.head), 0, (size_t)dim * sizeof(float));
            for (ptrdiff_t key = first / KEYS * KEYS; key < last; key += KEYS) {
                struct block block = {key, least(KEYS, place.length - key), 0, 0};
                pack_transposed(k, place.start + key, block.count, place.shared, dim, keys);
                pack(v, place.start + key, block.count, place.shared, dim, values, 0);
                for (ptrdiff_t i = top; i < bottom; i += ROWS) {
                    float factors[ROWS];
                    if (!see(shape, i, bottom, place.length, &block))
                        continue;
                    gather(q, &place, i, dim, shape->scale, some);
                    multiply(some, dim, keys + block.from * dim, dim, dim, scores + block.from, KEYS,
                             (block.to - block.from) / PANEL);
                    for (ptrdiff_t r = 0; r < ROWS; r++) {
                        ptrdiff_t from, to;
                        float unused[2] = {0};
                        const int real = i + r < bottom;
                        seen_columns(shape, i + r, bottom, place.length, &block, &from, &to);
                        factors[r] = weigh(scores + r * KEYS, &block, from, to, real ? largest + i + r - top : unused,
                                           real ? sums + i + r - top : unused + 1);
                    }
                    multiply(scores + block.from, KEYS, values + block.from * PANEL, KEYS,
                             least(block.to, block.count) - block.from, some, dim, dim / PANEL);
                    for (ptrdiff_t r = 0; r < ROWS && i + r < bottom; r++) {
                        float *to = row_of(o, place.start + i + r, place.head);
                        for (ptrdiff_t d = 0; d < dim; d++)
                            to[d] = to[d] * factors[r] + some[r * dim + d];
                    }
                }
            }
            for (ptrdiff_t i = top; i < bottom; i++) {
                float *to = row_of(o, place.start + i, place.head);
                for (ptrdiff_t d = 0; d < dim; d++)
                    to[d] /= sums[i - top];
                logs[(place.start + i) * shape->heads + place.head] = largest[i - top] + logf(sums[i - top]);
            }
        }
    }
}

/* Gradients of the above from `grad` to o: dq, and for each head of q its share of dk and dv, all [total, heads, dim]. */
void cpu_attention_backward(const struct heads *grad, const struct heads *q, const struct heads *k, const struct heads *v,
                                const struct heads *o, const float *logs, const struct heads *dq, const struct heads *dk,
                                const struct heads *dv, const int64_t *starts, const int64_t *lengths, ptrdiff_t samples,
                                const struct shape *shape)
{
    const ptrdiff_t dim = shape->dim;
#pragma omp parallel for schedule(dynamic)
    for (ptrdiff_t task = 0; task < samples * shape->heads; task++) {
        _Alignas(64) float keys[KEYS * WIDEST], across[KEYS * WIDEST], values[KEYS * WIDEST]; /* keys as they are, and turned */
        _Alignas(64) float to_keys[KEYS * WIDEST], to_values[KEYS * WIDEST];
        _Alignas(64) float weights[ROWS * KEYS], slopes[ROWS * KEYS], some[ROWS * WIDEST], came[ROWS * WIDEST];
        _Alignas(64) float made[ROWS * WIDEST];
        const struct place place = place_of(starts, lengths, shape, task);
        for (ptrdiff_t i = 0; i < place.length; i++)
            memset(row_of(dq, place.start + i, place.head), 0, (size_t)dim * sizeof(float));
        for (ptrdiff_t key = 0; key < place.length; key += KEYS) {
            struct block block = {key, least(KEYS, place.length - key), 0, 0};
            pack(k, place.start + key, block.count, place.shared, dim, keys, 0);
            pack_transposed(k, place.start + key, block.count, place.shared, dim, across);
            pack_transposed(v, place.start + key, block.count, place.shared, dim, values);
            memset(to_keys, 0, (size_t)(KEYS * dim) * sizeof(float));
            memset(to_values, 0, (size_t)(KEYS * dim) * sizeof(float));
            for (ptrdiff_t i = shape->causal ? key / ROWS * ROWS : 0; i < place.length; i += ROWS) {
                if (!see(shape, i, place.length, place.length, &block))
                    continue;
                const ptrdiff_t panels = (block.to - block.from) / PANEL, seen = least(block.to, block.count) - block.from;
                gather(q, &place, i, dim, shape->scale, some);
                gather(grad, &place, i, dim, 1.0f, came);
                multiply(some, dim, across + block.from * dim, dim, dim, weights + block.from, KEYS, panels);
                multiply(came, dim, values + block.from * dim, dim, dim, slopes + block.from, KEYS, panels);
                for (ptrdiff_t r = 0; r < ROWS; r++) {
                    const ptrdiff_t at = place.start + least(i + r, place.length - 1);
                    const float *out = row_of(o, at, place.head), log_sum = logs[at * shape->heads + place.head];
                    float *p = weights + r * KEYS, *ds = slopes + r * KEYS, along = 0;
                    ptrdiff_t from, to;
                    seen_columns(shape, i + r, place.length, place.length, &block, &from, &to);
                    for (ptrdiff_t d = 0; d < dim; d++)
                        along += out[d] * came[r * dim + d];
                    for (ptrdiff_t j = block.from; j < block.to; j++) {
                        p[j] = exponential(p[j] - log_sum);
                        ds[j] = p[j] * (ds[j] - along);
                    }
                    fill_beside(p, &block, from, to, 0);
                    fill_beside(ds, &block, from, to, 0);
                }
                multiply(slopes + block.from, KEYS, keys + block.from * PANEL, KEYS, seen, made, dim, dim / PANEL);
                for (ptrdiff_t r = 0; r < ROWS && i + r < place.length; r++) {
                    float *to = row_of(dq, place.start + i + r, place.head);
                    for (ptrdiff_t d = 0; d < dim; d++)
                        to[d] += made[r * dim + d] * shape->scale;
                }
                add_products(slopes + block.from, some, dim, seen, to_keys + block.from * PANEL);
                add_products(weights + block.from, came, dim, seen, to_values + block.from * PANEL);
            }
            pack(dk, place.start + key, block.count, place.head, dim, to_keys, 1);
            pack(dv, place.start + key, block.count, place.head, dim, to_values, 1);
        }
    }
}
