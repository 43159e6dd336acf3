/* The layout of a step, and operations on rows, their attention over pages and the updates of their adapters. */
#ifndef LORAKEET_PAGED_H
#define LORAKEET_PAGED_H

#include "gemm/w8a16.h"
#if defined(__AVX2__)

enum {
    PAGED_FEW = 48,      /* rows, at most, of the product that reads the weight once for all */
    PAGED_TOGETHER = 3,  /* linear layers of one input, at most: q, k, v */
    PAGED_RANGES = 1024, /* ranges of memory that a product brings into the caches for later, at most */
    PAGED_QUERY_ROWS = 4, /* rows of a prompt, at most, that attend together */
    PAGED_TILE = VLEN / 4 /* rows of one adapter, at most, that a thread computes together */
};

/* Rows that follow each other and have one adapter, and the middle of their work within that of all rows. */
struct paged_tile {
    ptrdiff_t first, rows;
    float middle;
};

/* The workspace: vectors of each row, scores of each thread, the rounded rows of a product, and the tiles. */
struct paged_space {
    float *normed, *q, *k, *v, *mixed, *made, *gate, *up, *low_rank, *scores, *packed, *tile_memory;
    struct paged_tile *tiles;
    ptrdiff_t low_rank_width, size, tile_count, tokens; /* tokens: that all rows attend to */
    float work;
};

/* Linear layers with one input x [n, in], their numbers from `first` on, and their outputs h [n, out]. Their products bring
 * the keys or values of a layer into the caches, from `bring` on, unless it is NULL. */
struct paged_group {
    const struct lk_linear *linears[PAGED_TOGETHER];
    float *h[PAGED_TOGETHER];
    const float *x;
    ptrdiff_t count, first;
    const float *bring;
};
enum { PAGED_QKV, PAGED_O, PAGED_GATE_UP, PAGED_DOWN, PAGED_GROUPS };

/* A head of keys and values of a sequence. */
struct paged_keys {
    const float *keys, *values; /* of the head, in page 0 */
    const int64_t *table;       /* pages of the sequence */
    ptrdiff_t page_stride;      /* floats from page to page */
    ptrdiff_t page_tokens, width;
    float scaling;
};

/* A head of a row that attends to them. */
struct paged_query {
    const float *q;   /* [width] */
    float *to;        /* [width] */
    float *scores;    /* a workspace of paged_scores(length) floats */
    ptrdiff_t length; /* keys that it sees, from the first on */
};

/* Threads that complete tiles, at most. */
static inline int paged_team(const struct paged_space *s)
{
    return s->tile_count > 1 ? most_threads() : 1;
}

/* Floats of the scores of a query. */
static inline ptrdiff_t paged_scores(ptrdiff_t length)
{
    return (length + LK_PAGE_STEP - 1) / LK_PAGE_STEP * LK_PAGE_STEP;
}

ptrdiff_t lk_packed_update_size(ptrdiff_t rank, ptrdiff_t out, ptrdiff_t in);
HIDDEN int paged_owner(const struct paged_space *s, const struct paged_tile *t, int threads);
HIDDEN int paged_attenders(const struct lk_paged *p, const struct paged_space *s);
HIDDEN int paged_attender(const struct paged_space *s, ptrdiff_t parts, ptrdiff_t before, ptrdiff_t tokens, int threads);
HIDDEN ptrdiff_t paged_later_tokens(const struct lk_paged *p, const struct paged_space *s, const float *pool,
                                    struct a16_later *to, ptrdiff_t most);
HIDDEN ptrdiff_t paged_later_updates(const struct lk_paged *p, const struct paged_space *s, const struct paged_group *g,
                                     struct a16_later *to);
HIDDEN void paged_attend(const struct paged_keys *k, const struct paged_query *queries, ptrdiff_t count);
HIDDEN void paged_add(float *restrict h, const float *restrict u, const float *restrict v, ptrdiff_t rank, ptrdiff_t out);
HIDDEN void paged_norm(const struct lk_norm *norm, const float *x, float *to, ptrdiff_t width);
HIDDEN void paged_rotate(const float *x, float *to, const float *cosine, const float *sine, ptrdiff_t width);
HIDDEN void paged_sum(float *restrict x, const float *restrict more, ptrdiff_t width);
HIDDEN void paged_gate(float *restrict gate, const float *restrict up, ptrdiff_t width);
HIDDEN void paged_update(const struct lk_update *update, const float *x, float *h, float *u, ptrdiff_t stride,
                         ptrdiff_t rows, ptrdiff_t in, ptrdiff_t out);
#endif
#endif
