/* Rows of many sequences through decoder layers of the Llama family with int8 weights (AVX2, AVX-512). Each has pages and
 * an adapter of its own.
 *
 * A row's result does not depend on the other rows: products round each row by itself and sum in integers (w8a16.h), and
 * everything else is a function of one row. Few rows and many take different loops with the same result. Reference:
 * kernels/paged.py.
 */
#include "paged.h"
#if defined(__AVX2__)

static struct paged_space paged_plan(const struct lk_paged *p, float *memory)
{
    const struct lk_layer *l = p->layers[0];
    const ptrdiff_t hidden = l->q.in, wide = l->q.out, narrow = l->k.out, inner = l->gate.out, n = p->n;
    const ptrdiff_t deepest = inner > wide ? (inner > hidden ? inner : hidden) : wide > hidden ? wide : hidden;
    const ptrdiff_t few = PAGED_TOGETHER * lk_packed_a16_rows(n, deepest) / (ptrdiff_t)sizeof(float);
    const ptrdiff_t bytes = p->amx ? lk_packed_a16_amx_size(n, deepest)
                                   : lk_packed_a16_size(n, deepest) * (ptrdiff_t)sizeof(int16_t);
    const ptrdiff_t many = n + bytes / (ptrdiff_t)sizeof(float);
    struct paged_space s = {0};
    s.low_rank_width = p->rank + VLEN;
    const struct {
        float **part;
        ptrdiff_t size;
    } parts[] = {{&s.normed, n * hidden}, {&s.q, n * wide},     {&s.k, n * narrow},
                 {&s.v, n * narrow},      {&s.mixed, n * wide}, {&s.made, n * hidden},
                 {&s.gate, n * inner},    {&s.up, n * inner},   {&s.low_rank, n * s.low_rank_width},
                 {&s.scores, most_threads() * PAGED_QUERY_ROWS * (l->heads / l->kv_heads) * paged_scores(p->length)},
                 {&s.packed, few > many ? few : many},
                 {&s.tile_memory, n * (ptrdiff_t)(sizeof(struct paged_tile) / sizeof(float))}};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        *parts[i].part = memory + s.size;
        s.size += (parts[i].size + 15) / 16 * 16;
    }
    s.tiles = (struct paged_tile *)s.tile_memory;
    return s;
}

/* The mean rank of an adapter. */
static float paged_rank(const struct lk_paged *p, const struct lk_update *adapter)
{
    ptrdiff_t sum = 0;
    for (ptrdiff_t at = 0; adapter && at < p->count * LK_LINEARS; at++)
        sum += adapter[at].rank;
    return (float)sum / (float)(p->count * LK_LINEARS);
}

/* Divide the rows into tiles. Threads take equal shares of the work, which grows with the rank. */
static void paged_divide(const struct lk_paged *p, struct paged_space *s)
{
    const ptrdiff_t share = min_of(PAGED_TILE, (p->n + most_threads() - 1) / most_threads());
    for (ptrdiff_t i = 0; i < p->n; s->tile_count++) {
        struct paged_tile *t = s->tiles + s->tile_count;
        const ptrdiff_t most = p->updates[i] ? share : 1; /* rows of the base share nothing */
        for (t->first = i; i < p->n && i - t->first < most && p->updates[i] == p->updates[t->first]; i++)
            t->rows = i + 1 - t->first;
        const float work = (float)t->rows * (2 + paged_rank(p, p->updates[t->first]));
        t->middle = s->work + 0.5f * work;
        s->work += work;
    }
    for (ptrdiff_t i = 0; i < p->n; i++)
        s->tokens += p->positions[i] + 1;
}

/* Number of floats of the workspace of lk_paged_layers. */
ptrdiff_t lk_paged_workspace(const struct lk_paged *p)
{
    return paged_plan(p, NULL).size;
}

/* Floats of the keys, or values, of a layer. */
static ptrdiff_t paged_layer_size(const struct lk_paged *p)
{
    const struct lk_layer *l = p->layers[0];
    return p->pages * l->kv_heads * p->page_tokens * l->head_width;
}

static void paged_groups(const struct lk_paged *p, const struct paged_space *s, ptrdiff_t layer, struct paged_group *g)
{
    const struct lk_layer *l = p->layers[layer];
    const ptrdiff_t first = layer * LK_LINEARS, next = (layer + 1) * paged_layer_size(p);
    const float *keys = layer + 1 < p->count ? p->keys + next : NULL, *values = keys ? p->values + next : NULL;
    g[PAGED_QKV] = (struct paged_group){{&l->q, &l->k, &l->v}, {s->q, s->k, s->v}, s->normed, 3, first, NULL};
    g[PAGED_O] = (struct paged_group){{&l->o}, {s->made}, s->mixed, 1, first + 3, NULL};
    g[PAGED_GATE_UP] = (struct paged_group){{&l->gate, &l->up}, {s->gate, s->up}, s->normed, 2, first + 4, keys};
    g[PAGED_DOWN] = (struct paged_group){{&l->down}, {s->made}, s->gate, 1, first + 6, values};
}

/* The scales of the n rounded rows for a layer of a group; the codes lie behind them. */
static float *paged_scales(const struct paged_space *s, const struct paged_group *g, ptrdiff_t layer, ptrdiff_t n)
{
    return s->packed + layer * (lk_packed_a16_rows(n, g->linears[0]->in) / (ptrdiff_t)sizeof(float));
}

/* Round a row of few for each layer of a group. Many rows are rounded where they are multiplied. */
static void paged_round(const struct lk_paged *p, const struct paged_space *s, const struct paged_group *g, ptrdiff_t i)
{
    const ptrdiff_t in = g->linears[0]->in;
    for (ptrdiff_t l = 0; l < g->count && p->n <= PAGED_FEW; l++) {
        float *scale = paged_scales(s, g, l, p->n);
        a16_round_row(g->x + i * in, g->linears[l]->column_scale, (int16_t *)(scale + 4 * p->n) + i * a16_row_codes(in),
                      scale + 4 * i, in);
    }
}

/* What each thread reads soon after the products of a group. They compute more than they read, and so bring it meanwhile
 * into its cache. Returns the number of ranges, at most PAGED_RANGES. */
static ptrdiff_t paged_later(const struct lk_paged *p, const struct paged_space *s, const struct paged_group *g,
                             struct a16_later *to)
{
    const ptrdiff_t updates = paged_later_updates(p, s, g, to);
    return updates + (g->bring ? paged_later_tokens(p, s, g->bring, to + updates, PAGED_RANGES - updates) : 0);
}
/* h = x diag(column_scale) W8^T + bias of each layer of a group. */
static void paged_multiply(const struct lk_paged *p, const struct paged_space *s, const struct paged_group *g)
{
    const ptrdiff_t n = p->n, in = g->linears[0]->in;
    struct a16_product products[PAGED_TOGETHER];
    struct a16_later later[PAGED_RANGES];
    void *rounded = s->packed + (n + 15) / 16 * 16;
    for (ptrdiff_t number = 0; number < g->count; number++) {
        const struct lk_linear *l = g->linears[number];
        if (n > PAGED_FEW && p->amx) {
            lk_pack_a16_amx(g->x, l->column_scale, rounded, s->packed, n, in, 0);
            lk_gemm_w8a16_amx(rounded, s->packed, l->weight, l->row_scale, l->bias, NULL, NULL, 0, g->h[number], n, l->out,
                              in);
        } else if (n > PAGED_FEW) {
            lk_pack_a16(g->x, l->column_scale, rounded, s->packed, n, in, 0);
            lk_gemm_w8a16(rounded, s->packed, l->weight, l->row_scale, l->bias, NULL, NULL, 0, g->h[number], n, l->out, in,
                          0);
        } else {
            const float *scale = paged_scales(s, g, number, n);
            products[number] = (struct a16_product){
                (const int16_t *)(scale + 4 * n), scale, l->weight, l->row_scale, l->bias, g->h[number], l->out};
        }
    }
    if (n <= PAGED_FEW)
        a16_multiply(products, g->count, n, in, later, paged_later(p, s, g, later));
}

/* Complete the products of the rows of a tile: the outlier columns of the weights, and the updates of their adapter. */
static void paged_complete(const struct lk_paged *p, const struct paged_space *s, const struct paged_tile *t,
                           const struct paged_group *g)
{
    const struct lk_update *adapter = p->updates[t->first];
    float *u = s->low_rank + t->first * s->low_rank_width;
    for (ptrdiff_t number = 0; number < g->count; number++) {
        const struct lk_linear *l = g->linears[number];
        const float *x = g->x + t->first * l->in;
        float *h = g->h[number] + t->first * l->out;
        for (ptrdiff_t i = 0; l->outliers && i < t->rows; i++) {
            for (ptrdiff_t c = 0; c < l->outliers; c++)
                u[c] = x[i * l->in + (ptrdiff_t)l->outlier_positions[c]];
            paged_add(h + i * l->out, u, l->outlier_values, l->outliers, l->out);
        }
        if (adapter && adapter[g->first + number].rank)
            paged_update(adapter + g->first + number, x, h, u, s->low_rank_width, t->rows, l->in, l->out);
    }
}

/* Where head 0 of a row's own key or value lies, for a layer. */
static float *paged_slot(const struct lk_paged *p, float *pool, ptrdiff_t layer, ptrdiff_t i)
{
    const struct lk_layer *l = p->layers[layer];
    const ptrdiff_t position = p->positions[i], page = p->tables[p->starts[i] + position / p->page_tokens];
    return pool + (((layer * p->pages + page) * l->kv_heads) * p->page_tokens + position % p->page_tokens) * l->head_width;
}

/* Rotate q and k of a row, and write k and v into the row's page. */
static void paged_heads(const struct lk_paged *p, const struct paged_space *s, ptrdiff_t layer, ptrdiff_t i)
{
    const struct lk_layer *l = p->layers[layer];
    const ptrdiff_t dim = l->head_width, wide = l->q.out, narrow = l->k.out;
    const float *cosine = p->cosine + i * dim, *sine = p->sine + i * dim;
    float *q = s->q + i * wide, *k = s->k + i * narrow, *v = s->v + i * narrow;
    float *keys = paged_slot(p, p->keys, layer, i), *values = paged_slot(p, p->values, layer, i);
    for (ptrdiff_t h = 0; h < l->heads; h++) {
        if (l->of_q.weight)
            paged_norm(&l->of_q, q + h * dim, q + h * dim, dim);
        paged_rotate(q + h * dim, q + h * dim, cosine, sine, dim);
    }
    for (ptrdiff_t h = 0; h < l->kv_heads; h++) {
        if (l->of_k.weight)
            paged_norm(&l->of_k, k + h * dim, k + h * dim, dim);
        paged_rotate(k + h * dim, keys + h * p->page_tokens * dim, cosine, sine, dim);
        memcpy(values + h * p->page_tokens * dim, v + h * dim, (size_t)dim * sizeof(float));
    }
}

/* Attention of rows from i on that have one sequence, at most `most`; returns their number. `count` heads from h on share
 * a head of keys. */
static ptrdiff_t paged_attend_rows(const struct lk_paged *p, const struct paged_space *s, ptrdiff_t layer, ptrdiff_t i,
                                   ptrdiff_t most, ptrdiff_t h, ptrdiff_t count)
{
    const struct lk_layer *l = p->layers[layer];
    const ptrdiff_t dim = l->head_width, each = l->heads / l->kv_heads, stride = p->page_tokens * dim;
    const ptrdiff_t from = (layer * p->pages * l->kv_heads + h / each) * stride, size = paged_scores(p->length);
    const struct paged_keys keys = {p->keys + from,       p->values + from, p->tables + p->starts[i],
                                    l->kv_heads * stride, p->page_tokens,   dim,
                                    l->scaling};
    float *scores = s->scores + own_thread() * PAGED_QUERY_ROWS * each * size;
    struct paged_query queries[PAGED_QUERY_ROWS * count];
    ptrdiff_t rows = 0, at = 0;
    for (; rows < most && p->starts[i + rows] == p->starts[i]; rows++)
        for (ptrdiff_t e = 0; e < count; e++, at++, scores += size) {
            const ptrdiff_t head = ((i + rows) * l->heads + h + e) * dim;
            queries[at] = (struct paged_query){s->q + head, s->mixed + head, scores, p->positions[i + rows] + 1};
        }
    paged_attend(&keys, queries, at);
    return rows;
}

/* Attention of few rows. Each thread takes those whose keys and values the last products brought into its cache. */
static void paged_attend_few(const struct lk_paged *p, const struct paged_space *s, ptrdiff_t layer, ptrdiff_t heads)
{
    const ptrdiff_t parts = p->layers[layer]->heads / heads;
#pragma omp parallel num_threads(paged_attenders(p, s))
    for (ptrdiff_t at = 0, before = 0; at < p->n * parts; at++) {
        const ptrdiff_t i = at / parts, tokens = p->positions[i] + 1;
        if (paged_attender(s, parts, before, tokens, team_threads()) == own_thread())
            paged_attend_rows(p, s, layer, i, 1, at % parts * heads, heads);
        before += tokens;
    }
}

/* Attention of many rows, a few at a time. */
static void paged_attend_many(const struct lk_paged *p, const struct paged_space *s, ptrdiff_t layer, ptrdiff_t heads)
{
    const ptrdiff_t parts = p->layers[layer]->heads / heads;
#pragma omp parallel for schedule(guided)
    for (ptrdiff_t at = 0; at < (p->n + PAGED_QUERY_ROWS - 1) / PAGED_QUERY_ROWS * parts; at++) {
        const ptrdiff_t end = min_of(p->n, (at / parts + 1) * PAGED_QUERY_ROWS);
        for (ptrdiff_t i = at / parts * PAGED_QUERY_ROWS; i < end;)
            i += paged_attend_rows(p, s, layer, i, end - i, at % parts * heads, heads);
    }
}

/* Attention of all rows: all heads of a head of keys together, if they keep the threads busy. */
static void paged_attention(const struct lk_paged *p, const struct paged_space *s, ptrdiff_t layer)
{
    const struct lk_layer *l = p->layers[layer];
    const ptrdiff_t heads = p->n * l->kv_heads < 4 * most_threads() ? 1 : l->heads / l->kv_heads;
    if (p->n > PAGED_FEW)
        paged_attend_many(p, s, layer, heads);
    else
        paged_attend_few(p, s, layer, heads);
}

/* Each tile of this thread, and each row of a tile. */
#define EACH_TILE                                                                                                      \
    PRAGMA(omp parallel num_threads(paged_team(s)))                                                                    \
    for (const struct paged_tile *t = s->tiles; t < s->tiles + s->tile_count; t++)                                     \
        if (paged_owner(s, t, team_threads()) == own_thread())
#define EACH_ROW for (ptrdiff_t i = t->first; i < t->first + t->rows; i++)

/* A layer up to attention. The products of a group need its input of all rows, so the threads meet before and after. */
static void paged_attend_layer(const struct lk_paged *p, struct paged_space *s, const struct paged_group *g,
                               ptrdiff_t layer)
{
    paged_multiply(p, s, g + PAGED_QKV);
    EACH_TILE
    {
        paged_complete(p, s, t, g + PAGED_QKV);
        EACH_ROW
        paged_heads(p, s, layer, i);
    }
    paged_attention(p, s, layer);
    EACH_TILE
    EACH_ROW
    paged_round(p, s, g + PAGED_O, i);
    paged_multiply(p, s, g + PAGED_O);
}

/* x [n, hidden] through all layers, in place; keys and values of its tokens are written into their pages. */
void lk_paged_layers(const struct lk_paged *p, float *x, float *workspace)
{
    struct paged_space space = paged_plan(p, workspace), *s = &space;
    struct paged_group g[PAGED_GROUPS];
    const ptrdiff_t hidden = p->layers[0]->q.in, inner = p->layers[0]->gate.out;
    paged_divide(p, s);
    paged_groups(p, s, 0, g);
    EACH_TILE
    EACH_ROW
    {
        paged_norm(&p->layers[0]->before, x + i * hidden, s->normed + i * hidden, hidden);
        paged_round(p, s, g + PAGED_QKV, i);
    }
    for (ptrdiff_t layer = 0; layer < p->count; layer++) {
        const struct lk_layer *l = p->layers[layer], *next = layer + 1 < p->count ? p->layers[layer + 1] : NULL;
        struct paged_group down = g[PAGED_DOWN];
        paged_attend_layer(p, s, g, layer);
        EACH_TILE
        {
            paged_complete(p, s, t, g + PAGED_O);
            EACH_ROW
            {
                paged_sum(x + i * hidden, s->made + i * hidden, hidden);
                paged_norm(&l->after, x + i * hidden, s->normed + i * hidden, hidden);
                paged_round(p, s, g + PAGED_GATE_UP, i);
            }
        }
        paged_multiply(p, s, g + PAGED_GATE_UP);
        EACH_TILE
        {
            paged_complete(p, s, t, g + PAGED_GATE_UP);
            EACH_ROW
            {
                paged_gate(s->gate + i * inner, s->up + i * inner, inner);
                paged_round(p, s, g + PAGED_DOWN, i);
            }
        }
        paged_multiply(p, s, g + PAGED_DOWN);
        if (next)
            paged_groups(p, s, layer + 1, g);
        EACH_TILE
        {
            paged_complete(p, s, t, &down);
            EACH_ROW
            {
                paged_sum(x + i * hidden, s->made + i * hidden, hidden);
                if (next) {
                    paged_norm(&next->before, x + i * hidden, s->normed + i * hidden, hidden);
                    paged_round(p, s, g + PAGED_QKV, i);
                }
            }
        }
    }
}
#endif
