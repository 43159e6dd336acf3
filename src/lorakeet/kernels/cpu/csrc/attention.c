/* Attention within each sample of a packed batch, forward and backward, in fp32.
 *
 * One block of keys and values at a time is packed into panels that a few queries are multiplied with. Their scores are
 * used while they are in the cache. The sums are rescaled when a later block has a larger score (Dao et al. 2022,
 * arXiv:2205.14135). Reference: kernels/attention/segment.py.
 */
#include "gemm/gemm_f32.h"
#include <string.h>

enum {
    ATT_MR = VLEN == 16 ? 8 : 4, /* queries in a tile: with ATT_NR columns its sums are eight vectors */
    ATT_NR = 16,                 /* columns of a panel */
    ATT_BLOCK = 256              /* keys in a block, and queries whose sums are held at a time */
};
_Static_assert((int)ATT_NR == (int)LK_HEAD_STEP && LK_MAX_HEAD_WIDTH % ATT_NR == 0, "a head is a whole number of panels");
_Static_assert(ATT_NR % VLEN == 0 && ATT_BLOCK % ATT_MR == 0 && ATT_BLOCK % ATT_NR == 0,
               "a block is a whole number of tiles");

/* One head of one sample. */
struct att_segment {
    ptrdiff_t start, length, head, kv_head;
};

/* A block of keys that a tile of queries is multiplied with: its first key, their count, and the range [from, to) that any
 * of the queries may attend to, in whole panels. */
struct att_block {
    ptrdiff_t key, count, from, to;
};

static inline float *att_row(const struct lk_heads *tensor, ptrdiff_t token, ptrdiff_t head)
{
    return tensor->data + token * tensor->token_stride + head * tensor->head_stride;
}

static inline struct att_segment att_segment_of(const int64_t *starts, const int64_t *lengths,
                                                const struct lk_attention *shape, ptrdiff_t task)
{
    const ptrdiff_t sample = task / shape->heads, head = task % shape->heads;
    return (struct att_segment){starts[sample], lengths[sample], head, head / (shape->heads / shape->kv_heads)};
}

/* The positions [from, to) that position i may attend to. */
static inline void att_visible(const struct lk_attention *shape, ptrdiff_t i, ptrdiff_t length, ptrdiff_t *from,
                               ptrdiff_t *to)
{
    const ptrdiff_t w = shape->window;
    const ptrdiff_t first = !w ? 0 : i - w + (shape->causal ? 1 : 0);
    *from = first > 0 ? first : 0;
    *to = shape->causal ? i + 1 : min_of(length, w ? i + w + 1 : length);
}

/* Whether the queries from i on, at most ATT_MR and before `end`, attend to any key of the block; sets its range. */
static inline int att_sees(const struct lk_attention *shape, ptrdiff_t i, ptrdiff_t end, ptrdiff_t length,
                           struct att_block *block)
{
    ptrdiff_t first, last, none;
    att_visible(shape, i, length, &first, &none);
    att_visible(shape, min_of(i + ATT_MR, end) - 1, length, &none, &last);
    first = first > block->key ? first - block->key : 0;
    last = min_of(last - block->key, block->count);
    block->from = first / ATT_NR * ATT_NR;
    block->to = (last + ATT_NR - 1) / ATT_NR * ATT_NR;
    return first < last;
}

/* The columns of a block, counted from its first key, that position i may attend to; none from `end` on. */
static inline void att_visible_columns(const struct lk_attention *shape, ptrdiff_t i, ptrdiff_t end, ptrdiff_t length,
                                       const struct att_block *block, ptrdiff_t *from, ptrdiff_t *to)
{
    *from = *to = block->from;
    if (i >= end)
        return;
    att_visible(shape, i, length, from, to);
    *from = *from - block->key > block->from ? min_of(*from - block->key, block->to) : block->from;
    *to = min_of(*to - block->key, min_of(block->count, block->to));
    *to = *to > *from ? *to : *from;
}

/* Keep a vector in a register: the compiler would load it again for each use. */
#if defined(__AVX__)
#define IN_REGISTER(vector) __asm__("" : "+x"(vector))
#else
#define IN_REGISTER(vector) ((void)0)
#endif
#define ATT_VECTORS (ATT_NR / VLEN)

/* c [ATT_MR, ATT_NR] of each of `panels` = a [ATT_MR, depth] b [panel][deep][ATT_NR]. */
static inline void att_multiply(const float *a, ptrdiff_t a_row, const float *b, ptrdiff_t deep, ptrdiff_t depth, float *c,
                                ptrdiff_t c_row, ptrdiff_t panels)
{
    for (ptrdiff_t p = 0; p < panels; p++, b += deep * ATT_NR, c += ATT_NR) {
        floats sums[ATT_MR][ATT_VECTORS] = {{{0}}};
        for (ptrdiff_t k = 0; k < depth; k++) {
            floats each[ATT_VECTORS];
            for (int v = 0; v < ATT_VECTORS; v++) {
                each[v] = load(b + k * ATT_NR + v * VLEN);
                IN_REGISTER(each[v]);
            }
            for (int r = 0; r < ATT_MR; r++)
                for (int v = 0; v < ATT_VECTORS; v++)
                    sums[r][v] += a[r * a_row + k] * each[v];
        }
        for (int r = 0; r < ATT_MR; r++)
            for (int v = 0; v < ATT_VECTORS; v++)
                store(c + r * c_row + v * VLEN, sums[r][v]);
    }
}

/* to [panel][ATT_BLOCK][ATT_NR] += s [ATT_MR, count]^T rows [ATT_MR, dim]. */
static inline void att_add_products(const float *s, const float *rows, ptrdiff_t dim, ptrdiff_t count, float *to)
{
    for (ptrdiff_t d = 0; d < dim; d += VLEN) {
        float *at = to + d / ATT_NR * ATT_BLOCK * ATT_NR + d % ATT_NR;
        floats each[ATT_MR];
        for (int r = 0; r < ATT_MR; r++)
            each[r] = load(rows + r * dim + d);
        for (ptrdiff_t j = 0; j < count; j++) {
            floats sum = load(at + j * ATT_NR);
            for (int r = 0; r < ATT_MR; r++)
                sum += s[r * ATT_BLOCK + j] * each[r];
            store(at + j * ATT_NR, sum);
        }
    }
}

/* `count` positions of a head from `first` on -> [position / ATT_NR][dim][ATT_NR]; zeros in the last panel. */
static void att_pack_transposed(const struct lk_heads *from, ptrdiff_t first, ptrdiff_t count, ptrdiff_t head,
                                ptrdiff_t dim, float *to)
{
    ptrdiff_t j = 0;
    if (count % ATT_NR)
        memset(to + count / ATT_NR * dim * ATT_NR, 0, (size_t)(dim * ATT_NR) * sizeof(float));
#if defined(__AVX2__)
    for (; j + 8 <= count; j += 8)
        for (ptrdiff_t d = 0; d < dim; d += 8) {
            __m256 rows[8], columns[8];
            for (int r = 0; r < 8; r++)
                rows[r] = _mm256_loadu_ps(att_row(from, first + j + r, head) + d);
            f32_transposed(rows, columns);
            for (int r = 0; r < 8; r++)
                _mm256_storeu_ps(to + (j / ATT_NR * dim + d + r) * ATT_NR + j % ATT_NR, columns[r]);
        }
#endif
    for (; j < count; j++) {
        const float *row = att_row(from, first + j, head);
        float *at = to + j / ATT_NR * dim * ATT_NR + j % ATT_NR;
        for (ptrdiff_t d = 0; d < dim; d++)
            at[d * ATT_NR] = row[d];
    }
}

/* `count` positions of a head from `first` on -> [dim / ATT_NR][ATT_BLOCK][ATT_NR]; with `back` the inverse. */
static void att_pack(const struct lk_heads *rows, ptrdiff_t first, ptrdiff_t count, ptrdiff_t head, ptrdiff_t dim,
                     float *panels, int back)
{
    for (ptrdiff_t j = 0; j < count; j++)
        for (ptrdiff_t d = 0; d < dim; d += ATT_NR) {
            float *row = att_row(rows, first + j, head) + d, *at = panels + (d / ATT_NR * ATT_BLOCK + j) * ATT_NR;
            memcpy(back ? row : at, back ? at : row, ATT_NR * sizeof(float));
        }
}

/* Gather ATT_MR positions of a head from i on, times `factor`; zeros beyond the sample. */
static inline void att_gather(const struct lk_heads *from, const struct att_segment *segment, ptrdiff_t i, ptrdiff_t dim,
                              float factor, float *to)
{
    memset(to, 0, (size_t)(ATT_MR * dim) * sizeof(float));
    for (ptrdiff_t r = 0; r < ATT_MR && i + r < segment->length; r++) {
        const float *row = att_row(from, segment->start + i + r, segment->head);
        for (ptrdiff_t d = 0; d < dim; d++)
            to[r * dim + d] = row[d] * factor;
    }
}

/* The largest of `most` and the scores from..to of a block; NaN is never larger, and so no compiler vectorises it. */
static inline float att_largest(const float *s, const struct att_block *block, ptrdiff_t from, ptrdiff_t to, float most)
{
    typedef int32_t mask __attribute__((vector_size(4 * VLEN)));
    floats each = most - (floats){0};
    mask column;
    for (int v = 0; v < VLEN; v++)
        column[v] = (int32_t)block->from + v;
    for (ptrdiff_t j = block->from; j < block->to; j += VLEN, column += VLEN) {
        const floats next = load(s + j);
        const mask larger = (next > each) & (column >= (int32_t)from) & (column < (int32_t)to);
        each = (floats)(((mask)next & larger) | ((mask)each & ~larger));
    }
    for (int v = 0; v < VLEN; v++)
        most = each[v] > most ? each[v] : most;
    return most;
}

/* Scores of one query -> e^(score - largest), 0 for masked keys; `largest` and `sum` run over the blocks. Returns the
 * factor by which the sums of earlier blocks must be multiplied. */
static inline float att_softmax(float *s, const struct att_block *block, ptrdiff_t from, ptrdiff_t to, float *largest,
                                float *sum)
{
    if (from == to) {
        memset(s + block->from, 0, (size_t)(block->to - block->from) * sizeof(float));
        return 1;
    }
    const float most = att_largest(s, block, from, to, *largest);
    float more = 0;
    for (ptrdiff_t j = block->from; j < block->to; j++) {
        const float each = exponential(s[j] - most);
        s[j] = j < from || j >= to ? 0.0f : each;
        more += s[j];
    }
    const float factor = *sum != 0 ? exponential(*largest - most) : 0;
    *sum = *sum * factor + more;
    *largest = most;
    return factor;
}

/* o [total, heads, dim] and log sum exp [total, heads]; sample n covers the positions [starts[n], starts[n] + lengths[n]). */
void lk_attention_forward(const struct lk_heads *q, const struct lk_heads *k, const struct lk_heads *v,
                          const struct lk_heads *o, float *logs, const int64_t *starts, const int64_t *lengths,
                          ptrdiff_t samples, const struct lk_attention *shape)
{
    const ptrdiff_t dim = shape->head_width;
#pragma omp parallel for schedule(dynamic)
    for (ptrdiff_t task = 0; task < samples * shape->heads; task++) {
        _Alignas(64) float keys[ATT_BLOCK * LK_MAX_HEAD_WIDTH], values[ATT_BLOCK * LK_MAX_HEAD_WIDTH];
        _Alignas(64) float scores[ATT_MR * ATT_BLOCK], some[ATT_MR * LK_MAX_HEAD_WIDTH];
        float sums[ATT_BLOCK], largest[ATT_BLOCK];
        const struct att_segment segment = att_segment_of(starts, lengths, shape, task);
        for (ptrdiff_t top = 0; top < segment.length; top += ATT_BLOCK) {
            const ptrdiff_t bottom = min_of(top + ATT_BLOCK, segment.length);
            ptrdiff_t none, first, last;
            att_visible(shape, top, segment.length, &first, &none);
            att_visible(shape, bottom - 1, segment.length, &none, &last);
            for (ptrdiff_t i = 0; i < ATT_BLOCK; i++) {
                sums[i] = 0;
                largest[i] = -INFINITY;
            }
            for (ptrdiff_t i = top; i < bottom; i++)
                memset(att_row(o, segment.start + i, segment.head), 0, (size_t)dim * sizeof(float));
            for (ptrdiff_t key = first / ATT_BLOCK * ATT_BLOCK; key < last; key += ATT_BLOCK) {
                struct att_block block = {key, min_of(ATT_BLOCK, segment.length - key), 0, 0};
                att_pack_transposed(k, segment.start + key, block.count, segment.kv_head, dim, keys);
                att_pack(v, segment.start + key, block.count, segment.kv_head, dim, values, 0);
                for (ptrdiff_t i = top; i < bottom; i += ATT_MR) {
                    float factors[ATT_MR];
                    if (!att_sees(shape, i, bottom, segment.length, &block))
                        continue;
                    att_gather(q, &segment, i, dim, shape->scale, some);
                    att_multiply(some, dim, keys + block.from * dim, dim, dim, scores + block.from, ATT_BLOCK,
                                 (block.to - block.from) / ATT_NR);
                    for (ptrdiff_t r = 0; r < ATT_MR; r++) {
                        ptrdiff_t from, to;
                        float unused[2] = {0};
                        const int real = i + r < bottom;
                        att_visible_columns(shape, i + r, bottom, segment.length, &block, &from, &to);
                        factors[r] = att_softmax(scores + r * ATT_BLOCK, &block, from, to,
                                                 real ? largest + i + r - top : unused,
                                                 real ? sums + i + r - top : unused + 1);
                    }
                    att_multiply(scores + block.from, ATT_BLOCK, values + block.from * ATT_NR, ATT_BLOCK,
                                 min_of(block.to, block.count) - block.from, some, dim, dim / ATT_NR);
                    for (ptrdiff_t r = 0; r < ATT_MR && i + r < bottom; r++) {
                        float *to = att_row(o, segment.start + i + r, segment.head);
                        for (ptrdiff_t d = 0; d < dim; d++)
                            to[d] = to[d] * factors[r] + some[r * dim + d];
                    }
                }
            }
            for (ptrdiff_t i = top; i < bottom; i++) {
                float *to = att_row(o, segment.start + i, segment.head);
                for (ptrdiff_t d = 0; d < dim; d++)
                    to[d] /= sums[i - top];
                logs[(segment.start + i) * shape->heads + segment.head] = largest[i - top] + logf(sums[i - top]);
            }
        }
    }
}

/* Gradients from `grad` to o: dq, and the share of each head of q in dk and dv, all [total, heads, dim]. */
void lk_attention_backward(const struct lk_heads *grad, const struct lk_heads *q, const struct lk_heads *k,
                           const struct lk_heads *v, const struct lk_heads *o, const float *logs,
                           const struct lk_heads *dq, const struct lk_heads *dk, const struct lk_heads *dv,
                           const int64_t *starts, const int64_t *lengths, ptrdiff_t samples,
                           const struct lk_attention *shape)
{
    const ptrdiff_t dim = shape->head_width;
#pragma omp parallel for schedule(dynamic)
    for (ptrdiff_t task = 0; task < samples * shape->heads; task++) {
        _Alignas(64) float keys[ATT_BLOCK * LK_MAX_HEAD_WIDTH], across[ATT_BLOCK * LK_MAX_HEAD_WIDTH],
            values[ATT_BLOCK * LK_MAX_HEAD_WIDTH]; /* keys, and keys transposed */
        _Alignas(64) float to_keys[ATT_BLOCK * LK_MAX_HEAD_WIDTH], to_values[ATT_BLOCK * LK_MAX_HEAD_WIDTH];
        _Alignas(64) float weights[ATT_MR * ATT_BLOCK], slopes[ATT_MR * ATT_BLOCK], some[ATT_MR * LK_MAX_HEAD_WIDTH];
        _Alignas(64) float came[ATT_MR * LK_MAX_HEAD_WIDTH], made[ATT_MR * LK_MAX_HEAD_WIDTH];
        const struct att_segment segment = att_segment_of(starts, lengths, shape, task);
        for (ptrdiff_t i = 0; i < segment.length; i++)
            memset(att_row(dq, segment.start + i, segment.head), 0, (size_t)dim * sizeof(float));
        for (ptrdiff_t key = 0; key < segment.length; key += ATT_BLOCK) {
            struct att_block block = {key, min_of(ATT_BLOCK, segment.length - key), 0, 0};
            att_pack(k, segment.start + key, block.count, segment.kv_head, dim, keys, 0);
            att_pack_transposed(k, segment.start + key, block.count, segment.kv_head, dim, across);
            att_pack_transposed(v, segment.start + key, block.count, segment.kv_head, dim, values);
            for (ptrdiff_t panel = 0; panel < dim * ATT_BLOCK; panel += ATT_NR * ATT_BLOCK) {
                memset(to_keys + panel, 0, (size_t)(ATT_NR * block.count) * sizeof(float));
                memset(to_values + panel, 0, (size_t)(ATT_NR * block.count) * sizeof(float));
            }
            for (ptrdiff_t i = shape->causal ? key / ATT_MR * ATT_MR : 0; i < segment.length; i += ATT_MR) {
                if (!att_sees(shape, i, segment.length, segment.length, &block))
                    continue;
                const ptrdiff_t panels = (block.to - block.from) / ATT_NR;
                const ptrdiff_t seen = min_of(block.to, block.count) - block.from;
                att_gather(q, &segment, i, dim, shape->scale, some);
                att_gather(grad, &segment, i, dim, 1.0f, came);
                att_multiply(some, dim, across + block.from * dim, dim, dim, weights + block.from, ATT_BLOCK, panels);
                att_multiply(came, dim, values + block.from * dim, dim, dim, slopes + block.from, ATT_BLOCK, panels);
                for (ptrdiff_t r = 0; r < ATT_MR; r++) {
                    const ptrdiff_t at = segment.start + min_of(i + r, segment.length - 1);
                    const float *out = att_row(o, at, segment.head), log_sum = logs[at * shape->heads + segment.head];
                    float *p = weights + r * ATT_BLOCK, *ds = slopes + r * ATT_BLOCK, along = 0;
                    ptrdiff_t from, to;
                    att_visible_columns(shape, i + r, segment.length, segment.length, &block, &from, &to);
                    for (ptrdiff_t d = 0; d < dim; d++)
                        along += out[d] * came[r * dim + d];
                    for (ptrdiff_t j = block.from; j < block.to; j++) {
                        const float each = exponential(p[j] - log_sum), slope = each * (ds[j] - along);
                        p[j] = j < from || j >= to ? 0.0f : each;
                        ds[j] = j < from || j >= to ? 0.0f : slope;
                    }
                }
                att_multiply(slopes + block.from, ATT_BLOCK, keys + block.from * ATT_NR, ATT_BLOCK, seen, made, dim,
                             dim / ATT_NR);
                for (ptrdiff_t r = 0; r < ATT_MR && i + r < segment.length; r++) {
                    float *to = att_row(dq, segment.start + i + r, segment.head);
                    for (ptrdiff_t d = 0; d < dim; d++)
                        to[d] += made[r * dim + d] * shape->scale;
                }
                att_add_products(slopes + block.from, some, dim, seen, to_keys + block.from * ATT_NR);
                att_add_products(weights + block.from, came, dim, seen, to_values + block.from * ATT_NR);
            }
            att_pack(dk, segment.start + key, block.count, segment.head, dim, to_keys, 1);
            att_pack(dv, segment.start + key, block.count, segment.head, dim, to_values, 1);
        }
    }
}
