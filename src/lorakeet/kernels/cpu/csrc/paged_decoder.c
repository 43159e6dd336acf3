/* Rows of many sequences through decoder layers of the Llama family with int8 weights (AVX2, AVX-512). Each has pages and
 * an adapter of its own.
 *
 * A row's result does not depend on the other rows: products round each row by itself and sum in integers (w8a16.h), and
 * everything else is a function of one row. Few rows and many take different loops with the same result. Reference:
 * kernels/paged.py.
 */
#include "paged.h"
#include "gemm/w8a16.h"
#if defined(__AVX2__)

enum {
    PAGED_FEW = 48,      /* rows, at most, of the product that reads the weight once for all */
    PAGED_TOGETHER = 3,  /* linear layers of one input, at most: q, k, v */
    PAGED_TILE = VLEN / 4 /* rows of one adapter, at most, that a thread computes together */
};
#define ONE_ROW static __attribute__((noinline)) void /* compiled once: every row takes the same instructions */

/* Rows that follow each other and have one adapter, and the middle of their work within that of all rows. */
struct paged_tile {
    ptrdiff_t first, rows;
    float middle;
};

/* The workspace: vectors of each row, scores of each thread, the rounded rows of a product, and the tiles. */
struct paged_space {
    float *normed, *q, *k, *v, *mixed, *made, *gate, *up, *low_rank, *scores, *packed, *tile_memory;
    struct paged_tile *tiles;
    ptrdiff_t low_rank_width, size, tile_count;
    float work;
};

static int paged_threads(void)
{
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static int paged_thread(void)
{
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

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
                 {&s.scores, paged_threads() * paged_scores(p->length)},
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
    const ptrdiff_t most = min_of(PAGED_TILE, (p->n + paged_threads() - 1) / paged_threads());
    for (ptrdiff_t i = 0; i < p->n; s->tile_count++) {
        struct paged_tile *t = s->tiles + s->tile_count;
        for (t->first = i; i < p->n && i - t->first < most && p->updates[i] == p->updates[t->first]; i++)
            t->rows = i + 1 - t->first;
        const float work = (float)t->rows * (2 + paged_rank(p, p->updates[t->first]));
        t->middle = s->work + 0.5f * work;
        s->work += work;
    }
}

/* Whether a tile is of this thread, within a parallel region. */
static int paged_is_own(const struct paged_space *s, const struct paged_tile *t)
{
#if defined(_OPENMP)
    return (int)(t->middle / s->work * (float)omp_get_num_threads()) == omp_get_thread_num();
#else
    return (void)s, (void)t, 1;
#endif
}

/* Number of floats of the workspace of lk_paged_layers. */
ptrdiff_t lk_paged_workspace(const struct lk_paged *p)
{
    return paged_plan(p, NULL).size;
}

/* h[i] [n, out] = x diag(column_scale) W8^T + bias of each of `count` linear layers with one input x [n, in]. */
static void paged_products(const struct lk_linear *const *linears, ptrdiff_t count, const float *x, float *const *h,
                           const struct lk_paged *p, float *packed)
{
    const ptrdiff_t n = p->n, in = linears[0]->in, stride = a16_row_codes(in);
    if (n > PAGED_FEW) {
        void *rounded = packed + (n + 15) / 16 * 16;
        for (ptrdiff_t l = 0; l < count; l++) {
            const struct lk_linear *w = linears[l];
            if (p->amx) {
                lk_pack_a16_amx(x, w->column_scale, rounded, packed, n, in, 0);
                lk_gemm_w8a16_amx(rounded, packed, w->weight, w->row_scale, w->bias, NULL, NULL, 0, h[l], n, w->out, in);
            } else {
                lk_pack_a16(x, w->column_scale, rounded, packed, n, in, 0);
                lk_gemm_w8a16(rounded, packed, w->weight, w->row_scale, w->bias, NULL, NULL, 0, h[l], n, w->out, in, 0);
            }
        }
        return;
    }
    struct a16_product products[PAGED_TOGETHER];
    const ptrdiff_t each = lk_packed_a16_rows(n, in) / (ptrdiff_t)sizeof(float);
    for (ptrdiff_t l = 0; l < count; l++) {
        float *scale = packed + l * each;
        products[l] = (struct a16_product){(int16_t *)(scale + 4 * n), scale,           linears[l]->weight,
                                           linears[l]->row_scale,      linears[l]->bias, h[l],
                                           linears[l]->out};
    }
    PARALLEL_ROWS(count * n, 2 * in)
    for (ptrdiff_t at = 0; at < count * n; at++) {
        const ptrdiff_t l = at / n, i = at % n;
        float *scale = packed + l * each;
        a16_round_row(x + i * in, linears[l]->column_scale, (int16_t *)(scale + 4 * n) + i * stride, scale + 4 * i, in);
    }
    a16_multiply(products, count, n, in);
}

/* h [out] += u [rank] v [rank, out]. */
ONE_ROW paged_add(float *restrict h, const float *restrict u, const float *restrict v, ptrdiff_t rank, ptrdiff_t out)
{
    ptrdiff_t j = 0;
    for (; j + 4 * VLEN <= out; j += 4 * VLEN) {
        floats sums[4];
        for (int e = 0; e < 4; e++)
            sums[e] = load(h + j + e * VLEN);
        for (ptrdiff_t r = 0; r < rank; r++)
            for (int e = 0; e < 4; e++)
                sums[e] += u[r] * load(v + r * out + j + e * VLEN);
        for (int e = 0; e < 4; e++)
            store(h + j + e * VLEN, sums[e]);
    }
    for (; j < out; j += VLEN) {
        const ptrdiff_t left = min_of(out - j, VLEN);
        floats sum = (floats)load_scaled(h + j, NULL, left);
        float made[VLEN];
        for (ptrdiff_t r = 0; r < rank; r++)
            sum += u[r] * (floats)load_scaled(v + r * out + j, NULL, left);
        store(made, sum);
        memcpy(h + j, made, (size_t)left * sizeof(float));
    }
}

/* Complete a product of the rows of a tile: the outlier columns of the weight, and the update of the rows' adapter. */
static void paged_complete(const struct lk_paged *p, const struct paged_space *s, const struct paged_tile *t,
                           const struct lk_linear *l, ptrdiff_t number, const float *x, float *h)
{
    const struct lk_update *adapter = p->updates[t->first];
    float *u = s->low_rank + t->first * s->low_rank_width;
    x += t->first * l->in;
    h += t->first * l->out;
    for (ptrdiff_t i = 0; l->outliers && i < t->rows; i++) {
        for (ptrdiff_t c = 0; c < l->outliers; c++)
            u[c] = x[i * l->in + (ptrdiff_t)l->outlier_positions[c]];
        paged_add(h + i * l->out, u, l->outlier_values, l->outliers, l->out);
    }
    if (adapter && adapter[number].rank)
        paged_update(adapter + number, x, h, u, s->low_rank_width, t->rows, l->in, l->out);
}

/* to = x / sqrt(mean(x^2) + eps) * weight; `to` may be x. */
ONE_ROW paged_norm(const struct lk_norm *norm, const float *x, float *to, ptrdiff_t width)
{
    floats squares = {0};
    float lanes[VLEN], sum = 0;
    for (ptrdiff_t k = 0; k < width; k += VLEN)
        squares += (floats)load_scaled(x + k, NULL, width - k) * (floats)load_scaled(x + k, NULL, width - k);
    store(lanes, squares);
    for (int lane = 0; lane < VLEN; lane++)
        sum += lanes[lane];
    const float s = 1.0f / sqrtf(sum / (float)width + norm->eps);
#pragma GCC ivdep
    for (ptrdiff_t k = 0; k < width; k++)
        to[k] = norm->weight[k] * (x[k] * s);
}

/* Rotary position of a head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), its halves. */
ONE_ROW paged_rotate(const float *x, float *to, const float *cosine, const float *sine, ptrdiff_t width)
{
    const ptrdiff_t half = width / 2;
#pragma GCC ivdep /* `to` may be x */
    for (ptrdiff_t k = 0; k < half; k++) {
        const float left = x[k], right = x[k + half];
        to[k] = left * cosine[k] - right * sine[k];
        to[k + half] = right * cosine[k + half] + left * sine[k + half];
    }
}

ONE_ROW paged_sum(float *restrict x, const float *restrict more, ptrdiff_t width)
{
    for (ptrdiff_t k = 0; k < width; k++)
        x[k] += more[k];
}

/* gate = silu(gate) up */
ONE_ROW paged_gate(float *restrict gate, const float *restrict up, ptrdiff_t width)
{
    for (ptrdiff_t k = 0; k < width; k++)
        gate[k] = gate[k] / (1.0f + exponential(-gate[k])) * up[k];
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

static void paged_attention(const struct lk_paged *p, const struct paged_space *s, ptrdiff_t layer)
{
    const struct lk_layer *l = p->layers[layer];
    const ptrdiff_t dim = l->head_width, each = l->heads / l->kv_heads, head_stride = p->page_tokens * dim;
#pragma omp parallel for schedule(guided) if (p->n * l->heads * p->length * dim > 32768)
    for (ptrdiff_t at = 0; at < p->n * l->heads; at++) {
        const ptrdiff_t i = at / l->heads, h = at % l->heads;
        const ptrdiff_t from = layer * p->pages * l->kv_heads * head_stride + h / each * head_stride;
        const struct paged_keys keys = {
            .keys = p->keys + from,
            .values = p->values + from,
            .table = p->tables + p->starts[i],
            .page_stride = l->kv_heads * head_stride,
            .page_tokens = p->page_tokens,
            .length = p->positions[i] + 1,
            .width = dim,
            .scaling = l->scaling,
        };
        paged_attend(&keys, s->q + at * dim, s->mixed + at * dim, s->scores + paged_thread() * paged_scores(p->length));
    }
}

/* Each tile of this thread, and each row of a tile. */
#define EACH_TILE                                                                                                      \
    PRAGMA(omp parallel if (s->tile_count > 1))                                                                        \
    for (const struct paged_tile *t = s->tiles; t < s->tiles + s->tile_count; t++)                                     \
        if (paged_is_own(s, t))
#define EACH_ROW for (ptrdiff_t i = t->first; i < t->first + t->rows; i++)

/* x [n, hidden] through all layers, in place; keys and values of its tokens are written into their pages. */
void lk_paged_layers(const struct lk_paged *p, float *x, float *workspace)
{
    struct paged_space space = paged_plan(p, workspace), *s = &space;
    paged_divide(p, s);
    for (ptrdiff_t layer = 0; layer < p->count; layer++) {
        const struct lk_layer *l = p->layers[layer];
        const ptrdiff_t hidden = l->q.in, inner = l->gate.out, first = layer * LK_LINEARS;
        EACH_TILE
        EACH_ROW
        paged_norm(&l->before, x + i * hidden, s->normed + i * hidden, hidden);
        paged_products((const struct lk_linear *const[]){&l->q, &l->k, &l->v}, 3, s->normed,
                       (float *const[]){s->q, s->k, s->v}, p, s->packed);
        EACH_TILE
        {
            paged_complete(p, s, t, &l->q, first, s->normed, s->q);
            paged_complete(p, s, t, &l->k, first + 1, s->normed, s->k);
            paged_complete(p, s, t, &l->v, first + 2, s->normed, s->v);
            EACH_ROW
            paged_heads(p, s, layer, i);
        }
        paged_attention(p, s, layer);
        paged_products((const struct lk_linear *const[]){&l->o}, 1, s->mixed, &s->made, p, s->packed);
        EACH_TILE
        {
            paged_complete(p, s, t, &l->o, first + 3, s->mixed, s->made);
            EACH_ROW
            {
                paged_sum(x + i * hidden, s->made + i * hidden, hidden);
                paged_norm(&l->after, x + i * hidden, s->normed + i * hidden, hidden);
            }
        }
        paged_products((const struct lk_linear *const[]){&l->gate, &l->up}, 2, s->normed,
                       (float *const[]){s->gate, s->up}, p, s->packed);
        EACH_TILE
        {
            paged_complete(p, s, t, &l->gate, first + 4, s->normed, s->gate);
            paged_complete(p, s, t, &l->up, first + 5, s->normed, s->up);
            EACH_ROW
            paged_gate(s->gate + i * inner, s->up + i * inner, inner);
        }
        paged_products((const struct lk_linear *const[]){&l->down}, 1, s->gate, &s->made, p, s->packed);
        EACH_TILE
        {
            paged_complete(p, s, t, &l->down, first + 6, s->gate, s->made);
            EACH_ROW
            paged_sum(x + i * hidden, s->made + i * hidden, hidden);
        }
    }
}
#endif
