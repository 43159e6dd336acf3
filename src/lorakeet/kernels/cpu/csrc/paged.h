/* Attention of rows over pages and updates of their adapters, for paged_decoder.c. */
#ifndef LORAKEET_PAGED_H
#define LORAKEET_PAGED_H

#include "gemm/gemm_tiles.h"
#if defined(__AVX2__)

/* The keys and values that one head of a row attends to. */
struct paged_keys {
    const float *keys, *values; /* of the head, in page 0 */
    const int64_t *table;       /* pages of the row's sequence */
    ptrdiff_t page_stride;      /* floats from page to page */
    ptrdiff_t page_tokens, length, width;
    float scaling;
};

/* Floats of the workspace of a head. */
static inline ptrdiff_t paged_scores(ptrdiff_t length)
{
    return (length + LK_PAGE_STEP - 1) / LK_PAGE_STEP * LK_PAGE_STEP;
}

HIDDEN void paged_attend(const struct paged_keys *k, const float *query, float *to, float *scores);
HIDDEN void paged_update(const struct lk_update *update, const float *x, float *h, float *u, ptrdiff_t stride,
                         ptrdiff_t rows, ptrdiff_t in, ptrdiff_t out);
#endif
#endif
