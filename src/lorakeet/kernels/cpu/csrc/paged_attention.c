/* Attention of one head of one row over the pages of its sequence (AVX2, AVX-512).
 *
 * The order of every sum depends on the number of keys alone. So a token's result is the same whether it comes alone, with
 * others, or within a prompt. Reference: kernels/paged.py.
 */
#include "paged.h"
#if defined(__AVX2__)

_Static_assert(LK_PAGE_STEP % VLEN == 0 && LK_HEAD_STEP % VLEN == 0, "a page and a head are whole vectors");
enum { PAGED_WIDE = 4 }; /* vectors of a head's values that are summed at a time */

/* Scores of VLEN keys that follow each other in a page. */
static inline floats paged_score(const float *query, const float *keys, ptrdiff_t width)
{
    int32_vector folded[VLEN];
    floats sums[VLEN] = {{0}};
    for (ptrdiff_t d = 0; d < width; d += VLEN) {
        const floats q = load(query + d);
        for (int key = 0; key < VLEN; key++)
            sums[key] += q * load(keys + key * width + d);
    }
    memcpy(folded, sums, sizeof folded);
    return (floats)fold_fp32(folded);
}

/* scores = scaling q K^T for all keys of a row, -inf behind the last; returns the largest. */
static float paged_all_scores(const struct paged_keys *k, const float *query, float *scores)
{
    float largest = -INFINITY;
    for (ptrdiff_t t = 0; t < k->length; t += VLEN) {
        const float *keys = k->keys + k->table[t / k->page_tokens] * k->page_stride + t % k->page_tokens * k->width;
        store(scores + t, paged_score(query, keys, k->width) * k->scaling);
    }
    for (ptrdiff_t t = k->length; t < paged_scores(k->length); t++)
        scores[t] = -INFINITY;
    for (ptrdiff_t t = 0; t < k->length; t++)
        largest = scores[t] > largest ? scores[t] : largest;
    return largest;
}

/* to [VECTORS * VLEN] = the weighted sum of the values, from value `d` of the head on. */
#define PAGED_SUM(VECTORS)                                                                                             \
    static inline void paged_sum_##VECTORS(const struct paged_keys *k, const float *weights, ptrdiff_t d, float *to)   \
    {                                                                                                                  \
        floats sums[VECTORS] = {{0}};                                                                                  \
        for (ptrdiff_t page = 0; page * k->page_tokens < k->length; page++) {                                          \
            const ptrdiff_t first = page * k->page_tokens, count = min_of(k->length - first, k->page_tokens);          \
            const float *values = k->values + k->table[page] * k->page_stride + d;                                     \
            for (ptrdiff_t t = 0; t < count; t++)                                                                      \
                for (int v = 0; v < VECTORS; v++)                                                                      \
                    sums[v] += weights[first + t] * load(values + t * k->width + v * VLEN);                            \
        }                                                                                                              \
        for (int v = 0; v < VECTORS; v++)                                                                              \
            store(to + v * VLEN, sums[v]);                                                                             \
    }
PAGED_SUM(4)
PAGED_SUM(1)

/* to [width] = softmax(scaling q K^T) V. `scores` is a workspace of paged_scores(length) floats. */
void paged_attend(const struct paged_keys *k, const float *query, float *to, float *scores)
{
    const float largest = paged_all_scores(k, query, scores);
    float sum = 0;
    for (ptrdiff_t t = 0; t < k->length; t++)
        scores[t] = exponential(scores[t] - largest);
    for (ptrdiff_t t = 0; t < k->length; t++)
        sum += scores[t];
    for (ptrdiff_t t = 0; t < k->length; t++)
        scores[t] /= sum;
    ptrdiff_t d = 0;
    for (; d + PAGED_WIDE * VLEN <= k->width; d += PAGED_WIDE * VLEN)
        paged_sum_4(k, scores, d, to + d);
    for (; d < k->width; d += VLEN)
        paged_sum_1(k, scores, d, to + d);
}
#endif
