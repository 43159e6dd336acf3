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
    PAGED_FEW = 32,    /* rows, at most, of the product that reads the weight once for all */
    PAGED_TOGETHER = 3 /* linear layers of one input, at most: q, k, v */
};
_Static_assert(LK_UPDATE_ROWS % 8 == 0 && VLEN % LK_UPDATE_ROWS == 0, "an update's rows are a whole part of a vector");
#define ONE_ROW static __attribute__((noinline)) void /* compiled once: every row takes the same instructions */

void lk_pack_a16(const float *x, const float *factor, int16_t *strips, float *scale, ptrdiff_t n, ptrdiff_t depth,
                 int error_feedback);
ptrdiff_t lk_packed_a16_size(ptrdiff_t n, ptrdiff_t depth);
ptrdiff_t lk_packed_a16_rows(ptrdiff_t n, ptrdiff_t depth);
void lk_gemm_w8a16(const int16_t *strips, const float *row_scale, const int8_t *weight, const float *scale,
                   const float *bias, const float *u, const float *v, ptrdiff_t rank, float *h, ptrdiff_t n,
                   ptrdiff_t out, ptrdiff_t in, int transposed);

/* The workspace: vectors of each row, scores of each thread, and the rounded rows of a product. */
struct paged_space {
    float *normed, *q, *k, *v, *mixed, *made, *gate, *up, *low_rank, *scores, *packed;
    ptrdiff_t low_rank_width, size;
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
    const ptrdiff_t many = n + lk_packed_a16_size(n, deepest) * (ptrdiff_t)sizeof(int16_t) / (ptrdiff_t)sizeof(float);
    struct paged_space s = {0};
    s.low_rank_width = p->rank + VLEN;
    const struct {
        float **part;
        ptrdiff_t size;
    } parts[] = {{&s.normed, n * hidden}, {&s.q, n * wide},     {&s.k, n * narrow},
                 {&s.v, n * narrow},      {&s.mixed, n * wide}, {&s.made, n * hidden},
                 {&s.gate, n * inner},    {&s.up, n * inner},   {&s.low_rank, n * s.low_rank_width},
                 {&s.scores, paged_threads() * paged_scores(p->length)},
                 {&s.packed, few > many ? few : many}};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        *parts[i].part = memory + s.size;
        s.size += (parts[i].size + 15) / 16 * 16;
    }
    return s;
}

/* Number of floats of the workspace of lk_paged_layers. */
ptrdiff_t lk_paged_workspace(const struct lk_paged *p)
{
    return paged_plan(p, NULL).size;
}

/* h[i] [n, out] = x diag(column_scale) W8^T + bias of each of `count` linear layers with one input x [n, in]. */
static void paged_products(const struct lk_linear *const *linears, ptrdiff_t count, const float *x, float *const *h,
                           ptrdiff_t n, float *packed)
{
    const ptrdiff_t in = linears[0]->in, stride = a16_row_codes(in);
    if (n > PAGED_FEW) {
        int16_t *strips = (int16_t *)(packed + (n + 15) / 16 * 16);
        for (ptrdiff_t l = 0; l < count; l++) {
            lk_pack_a16(x, linears[l]->column_scale, strips, packed, n, in, 0);
            lk_gemm_w8a16(strips, packed, linears[l]->weight, linears[l]->row_scale, linears[l]->bias, NULL, NULL, 0, h[l],
                          n, linears[l]->out, in, 0);
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

/* u [rank, padded] = scaling A x; 8 rows of A at a time. */
ONE_ROW paged_shrink(const struct lk_update *update, const float *x, float *u, ptrdiff_t in)
{
    for (ptrdiff_t r = 0; r < update->rank; r += LK_UPDATE_ROWS) {
        const float *a = update->a + r * in;
        floats sums[VLEN] = {{0}};
        int32_vector folded[VLEN];
        ptrdiff_t k = 0;
        for (; k + VLEN <= in; k += VLEN)
            for (int row = 0; row < LK_UPDATE_ROWS; row++)
                sums[row] += load(x + k) * load(a + row * in + k);
        if (k < in)
            for (int row = 0; row < LK_UPDATE_ROWS; row++)
                sums[row] += (floats)load_scaled(x + k, a + row * in + k, in - k);
        memcpy(folded, sums, sizeof folded);
        store(u + r, (floats)fold_fp32(folded) * update->scaling);
    }
}

/* Complete a row of a product: the outlier columns of the weight, and the row's own update. */
static void paged_complete(const struct lk_linear *l, const struct lk_update *update, const float *x, float *h, float *u)
{
    if (l->outliers) {
        for (ptrdiff_t c = 0; c < l->outliers; c++)
            u[c] = x[(ptrdiff_t)l->outlier_positions[c]];
        paged_add(h, u, l->outlier_values, l->outliers, l->out);
    }
    if (update && update->rank) {
        paged_shrink(update, x, u, l->in);
        paged_add(h, u, update->b, update->rank, l->out);
    }
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

static const struct lk_update *paged_update(const struct lk_paged *p, ptrdiff_t layer, ptrdiff_t i, ptrdiff_t linear)
{
    return p->updates[i] ? p->updates[i] + layer * LK_LINEARS + linear : NULL;
}

/* Where head 0 of a row's own key or value lies, for a layer. */
static float *paged_slot(const struct lk_paged *p, float *pool, ptrdiff_t layer, ptrdiff_t i)
{
    const struct lk_layer *l = p->layers[layer];
    const ptrdiff_t position = p->positions[i], page = p->tables[p->starts[i] + position / p->page_tokens];
    return pool + (((layer * p->pages + page) * l->kv_heads) * p->page_tokens + position % p->page_tokens) * l->head_width;
}

/* Complete q, k and v of a row, rotate q and k, and write k and v into the row's page. */
static void paged_heads(const struct lk_paged *p, const struct paged_space *s, ptrdiff_t layer, ptrdiff_t i)
{
    const struct lk_layer *l = p->layers[layer];
    const ptrdiff_t dim = l->head_width, wide = l->q.out, narrow = l->k.out;
    const float *x = s->normed + i * l->q.in, *cosine = p->cosine + i * dim, *sine = p->sine + i * dim;
    float *q = s->q + i * wide, *k = s->k + i * narrow, *v = s->v + i * narrow, *u = s->low_rank + i * s->low_rank_width;
    float *keys = paged_slot(p, p->keys, layer, i), *values = paged_slot(p, p->values, layer, i);
    paged_complete(&l->q, paged_update(p, layer, i, 0), x, q, u);
    paged_complete(&l->k, paged_update(p, layer, i, 1), x, k, u);
    paged_complete(&l->v, paged_update(p, layer, i, 2), x, v, u);
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

#define EACH_ROW PRAGMA(omp parallel for schedule(static) if (p->n > 1)) for (ptrdiff_t i = 0; i < p->n; i++)

/* x [n, hidden] through all layers, in place; keys and values of its tokens are written into their pages. */
void lk_paged_layers(const struct lk_paged *p, float *x, float *workspace)
{
    const struct paged_space space = paged_plan(p, workspace), *s = &space;
    for (ptrdiff_t layer = 0; layer < p->count; layer++) {
        const struct lk_layer *l = p->layers[layer];
        const ptrdiff_t hidden = l->q.in, inner = l->gate.out, width = s->low_rank_width;
        EACH_ROW
        paged_norm(&l->before, x + i * hidden, s->normed + i * hidden, hidden);
        paged_products((const struct lk_linear *const[]){&l->q, &l->k, &l->v}, 3, s->normed,
                       (float *const[]){s->q, s->k, s->v}, p->n, s->packed);
        EACH_ROW
        paged_heads(p, s, layer, i);
        paged_attention(p, s, layer);
        paged_products((const struct lk_linear *const[]){&l->o}, 1, s->mixed, &s->made, p->n, s->packed);
        EACH_ROW
        {
            paged_complete(&l->o, paged_update(p, layer, i, 3), s->mixed + i * l->o.in, s->made + i * hidden,
                           s->low_rank + i * width);
            paged_sum(x + i * hidden, s->made + i * hidden, hidden);
            paged_norm(&l->after, x + i * hidden, s->normed + i * hidden, hidden);
        }
        paged_products((const struct lk_linear *const[]){&l->gate, &l->up}, 2, s->normed,
                       (float *const[]){s->gate, s->up}, p->n, s->packed);
        EACH_ROW
        {
            float *u = s->low_rank + i * width;
            paged_complete(&l->gate, paged_update(p, layer, i, 4), s->normed + i * hidden, s->gate + i * inner, u);
            paged_complete(&l->up, paged_update(p, layer, i, 5), s->normed + i * hidden, s->up + i * inner, u);
            paged_gate(s->gate + i * inner, s->up + i * inner, inner);
        }
        paged_products((const struct lk_linear *const[]){&l->down}, 1, s->gate, &s->made, p->n, s->packed);
        EACH_ROW
        {
            paged_complete(&l->down, paged_update(p, layer, i, 6), s->gate + i * inner, s->made + i * hidden,
                           s->low_rank + i * width);
            paged_sum(x + i * hidden, s->made + i * hidden, hidden);
        }
    }
}
#endif
