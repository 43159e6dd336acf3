/* Attention over the pages of a sequence, of queries that share a head of keys and values (AVX2, AVX-512).
 *
 * A block of keys or values is read once for all queries. The order of a query's sums depends on the number of its keys
 * alone. So a token's result is the same whether it comes alone, with others, or within a prompt. Reference:
 * kernels/paged.py.
 */
#include "paged.h"
#if defined(__AVX2__)

_Static_assert(LK_PAGE_STEP % VLEN == 0 && LK_HEAD_STEP % VLEN == 0, "a page and a head are whole vectors");
enum {
    PAGED_WIDE = 4,         /* vectors of a head's values that are summed at a time */
    PAGED_BLOCK = 64,       /* tokens whose values stay in the L1 cache for all queries */
    PAGED_AHEAD = 2 * VLEN, /* tokens whose keys come into the cache before they are read */
};
_Static_assert(PAGED_BLOCK % LK_PAGE_STEP == 0, "a block is whole steps of a page");

/* Scores of VLEN keys that follow each other in a page. As many values from `ahead` on, if not NULL, come into the cache
 * meanwhile. */
static inline floats paged_score(const float *query, const float *keys, ptrdiff_t width, const float *ahead)
{
    int32_vector folded[VLEN];
    floats sums[VLEN] = {{0}};
    for (ptrdiff_t d = 0; d < width; d += VLEN) {
        const floats q = load(query + d);
        for (int key = 0; key < VLEN; key++) {
            sums[key] += q * load(keys + key * width + d);
            if (ahead)
                __builtin_prefetch(ahead + key * width + d);
        }
    }
    memcpy(folded, sums, sizeof folded);
    return (floats)fold_fp32(folded);
}

/* Where a token's key or value lies, in a pool. */
static inline const float *paged_token(const struct paged_keys *k, const float *pool, ptrdiff_t token)
{
    return pool + k->table[token / k->page_tokens] * k->page_stride + token % k->page_tokens * k->width;
}

/* scores = softmax of the scores of all keys of a query. */
static void paged_softmax(const struct paged_query *query)
{
    float *scores = query->scores, largest = -INFINITY, sum = 0;
    for (ptrdiff_t t = 0; t < query->length; t++)
        largest = scores[t] > largest ? scores[t] : largest;
    for (ptrdiff_t t = 0; t < query->length; t++)
        scores[t] = exponential(scores[t] - largest);
    for (ptrdiff_t t = 0; t < query->length; t++)
        sum += scores[t];
    for (ptrdiff_t t = 0; t < query->length; t++)
        scores[t] /= sum;
}

/* to [VECTORS * VLEN] += the weighted sum of the values of tokens from `first` to `end`, from value `d` of the head on. */
#define PAGED_SUM(VECTORS)                                                                                             \
    static inline void paged_sum_##VECTORS(const struct paged_keys *k, const float *weights, ptrdiff_t first,          \
                                           ptrdiff_t end, ptrdiff_t d, float *to)                                      \
    {                                                                                                                  \
        floats sums[VECTORS];                                                                                          \
        for (int v = 0; v < VECTORS; v++)                                                                              \
            sums[v] = load(to + d + v * VLEN);                                                                         \
        for (; first < end; first += LK_PAGE_STEP) {                                                                   \
            const float *values = paged_token(k, k->values, first) + d;                                                \
            for (ptrdiff_t t = 0; t < min_of(end - first, LK_PAGE_STEP); t++)                                          \
                for (int v = 0; v < VECTORS; v++)                                                                      \
                    sums[v] += weights[first + t] * load(values + t * k->width + v * VLEN);                            \
        }                                                                                                              \
        for (int v = 0; v < VECTORS; v++)                                                                              \
            store(to + d + v * VLEN, sums[v]);                                                                         \
    }
PAGED_SUM(4)
PAGED_SUM(1)

/* to [width] = softmax(scaling q K^T) V of each query. The first query brings keys into the cache for all, and the second one
 * values: hardware does not look beyond a page of memory. */
void paged_attend(const struct paged_keys *k, const struct paged_query *queries, ptrdiff_t count)
{
    ptrdiff_t longest = 0;
    for (const struct paged_query *one = queries; one < queries + count; one++)
        longest = one->length > longest ? one->length : longest;
    for (ptrdiff_t t = 0; t < longest; t += VLEN) {
        const float *keys = paged_token(k, k->keys, t);
        const float *ahead[] = {paged_token(k, k->keys, min_of(t + PAGED_AHEAD, longest - 1)), paged_token(k, k->values, t)};
        for (ptrdiff_t at = 0; at < count; at++)
            if (t < queries[at].length)
                store(queries[at].scores + t,
                      paged_score(queries[at].q, keys, k->width, at < 2 ? ahead[at] : NULL) * k->scaling);
    }
    for (const struct paged_query *one = queries; one < queries + count; one++) {
        paged_softmax(one);
        memset(one->to, 0, (size_t)k->width * sizeof(float));
    }
    for (ptrdiff_t first = 0; first < longest; first += PAGED_BLOCK)
        for (const struct paged_query *one = queries; one < queries + count; one++) {
            const ptrdiff_t end = min_of(one->length, first + PAGED_BLOCK);
            ptrdiff_t d = 0;
            for (; d + PAGED_WIDE * VLEN <= k->width; d += PAGED_WIDE * VLEN)
                paged_sum_4(k, one->scores, first, end, d, one->to);
            for (; d < k->width; d += VLEN)
                paged_sum_1(k, one->scores, first, end, d, one->to);
        }
}

/* Threads of the attention of few rows, at most. */
int paged_attenders(const struct lk_paged *p, const struct paged_space *s)
{
    const struct lk_layer *l = p->layers[0];
    return s->tokens * l->heads * l->head_width > 32768 ? most_threads() : 1;
}

/* The thread that attends for a part of a row, each row in `parts`. The part attends to `tokens`, and all parts before it to
 * `before`. Threads take equal shares. */
int paged_attender(const struct paged_space *s, ptrdiff_t parts, ptrdiff_t before, ptrdiff_t tokens, int threads)
{
    return (int)((2 * before + tokens) * threads / (2 * parts * s->tokens));
}

/* The keys or values from `pool` on of each row's former tokens. Returns the number of ranges, at most `most`. */
ptrdiff_t paged_later_tokens(const struct lk_paged *p, const struct paged_space *s, const float *pool,
                             struct a16_later *to, ptrdiff_t most)
{
    const struct lk_layer *l = p->layers[0];
    const ptrdiff_t stride = p->page_tokens * l->head_width;
    ptrdiff_t ranges = 0, before = 0;
    for (ptrdiff_t at = 0; at < p->n * l->kv_heads; at++) {
        const ptrdiff_t i = at / l->kv_heads, h = at % l->kv_heads, length = p->positions[i];
        const int owner = paged_attender(s, l->kv_heads, before, length + 1, paged_attenders(p, s));
        for (ptrdiff_t t = 0; t < length && ranges < most; t += p->page_tokens) {
            const int64_t page = p->tables[p->starts[i] + t / p->page_tokens];
            const ptrdiff_t size = min_of(length - t, p->page_tokens) * l->head_width;
            to[ranges++] = (struct a16_later){pool + (page * l->kv_heads + h) * stride,
                                              size * (ptrdiff_t)sizeof(float), owner};
        }
        before += length + 1;
    }
    return ranges;
}
#endif
