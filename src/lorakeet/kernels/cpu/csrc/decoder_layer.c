/* One new token of each of n texts through a decoder layer of the Llama family, its weights in 8 bits.
 *
 * Two calls, since between them the cache takes the new key and value: what is done before, and what after.
 * The products themselves are few_rows(); what lies between them are single passes over small vectors.
 */
#include "common.h"
#include <math.h>

/* A linear layer, and the low-rank update s B A x of an adapter where rank > 0. */
struct linear {
    const int8_t *weight;      /* [out, in] */
    const float *scale;        /* [out] */
    const float *columns;      /* [in], or NULL */
    const float *places;       /* [kept]: columns that are not rounded, as numbers */
    const float *values;       /* [kept, out]: theirs */
    const float *bias;         /* [out], or NULL */
    const float *a, *b;        /* [rank, in] and [out, rank] */
    ptrdiff_t out, in, rank, kept;
    float scaling;
};

struct norm {
    const float *weight; /* NULL: there is none */
    float eps;
};

struct layer {
    struct linear q, k, v, o, gate, up, down;
    struct norm before, after, of_q, of_k; /* of_q and of_k for each head */
    ptrdiff_t heads, cached, dim;          /* heads of q; of k and v; their width */
    float scaling;
};

/* h [n, out] from x [n, in]; `low` has room for n * rank values. */
static void multiply(const struct linear *l, const float *x, float *h, float *low, ptrdiff_t n)
{
    few_rows(x, l->weight, l->scale, l->columns, l->bias, h, n, l->out, l->in);
    for (ptrdiff_t at = 0; at < n * l->kept; at++) {
        const ptrdiff_t i = at / l->kept, c = at % l->kept;
        const float one = x[i * l->in + (ptrdiff_t)l->places[c]];
        for (ptrdiff_t j = 0; j < l->out; j++)
            h[i * l->out + j] += one * l->values[c * l->out + j];
    }
    for (ptrdiff_t at = 0; at < n * l->rank; at++) {
        const float *row = x + at / l->rank * l->in, *a = l->a + at % l->rank * l->in;
        float sum = 0;
        for (ptrdiff_t k = 0; k < l->in; k++)
            sum += row[k] * a[k];
        low[at] = sum * l->scaling;
    }
    for (ptrdiff_t i = 0; l->rank && i < n; i++)
        for (ptrdiff_t j = 0; j < l->out; j++) {
            float sum = 0;
            for (ptrdiff_t r = 0; r < l->rank; r++)
                sum += low[i * l->rank + r] * l->b[j * l->rank + r];
            h[i * l->out + j] += sum;
        }
}

/* to = x / sqrt(mean(x^2) + eps) * weight for rows x [n, width]; `to` may be x. */
static void normalise(const struct norm *norm, const float *x, float *to, ptrdiff_t n, ptrdiff_t width)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const float *row = x + i * width;
        float squares = 0;
        for (ptrdiff_t k = 0; k < width; k++)
            squares += row[k] * row[k];
        const float s = 1.0f / sqrtf(squares / (float)width + norm->eps);
        for (ptrdiff_t k = 0; k < width; k++)
            to[i * width + k] = norm->weight[k] * (row[k] * s);
    }
}

/* Rotary positions in place, x [n, heads, dim]: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), its halves. */
static void rotate(float *x, const float *cosine, const float *sine, ptrdiff_t step, ptrdiff_t n, ptrdiff_t heads,
                   ptrdiff_t dim)
{
    const ptrdiff_t half = dim / 2;
    for (ptrdiff_t at = 0; at < n * heads; at++) {
        const float *c = cosine + at / heads * step, *s = sine + at / heads * step;
        float *one = x + at * dim, *two = one + half;
        for (ptrdiff_t k = 0; k < half; k++) {
            const float left = one[k], right = two[k];
            one[k] = left * c[k] - right * s[k];
            two[k] = right * c[k + half] + left * s[k + half];
        }
    }
}

/* x [n, hidden] -> q [n, heads, dim], k and v [n, cached, dim]. Cosine and sine are [dim], each text `step` further. */
void before_attention(const struct layer *layer, const float *x, const float *cosine, const float *sine, ptrdiff_t step,
                      float *q, float *k, float *v, float *room, ptrdiff_t n)
{
    float *normed = room, *low = normed + n * layer->q.in;
    normalise(&layer->before, x, normed, n, layer->q.in);
    multiply(&layer->q, normed, q, low, n);
    multiply(&layer->k, normed, k, low, n);
    multiply(&layer->v, normed, v, low, n);
    if (layer->of_q.weight) {
        normalise(&layer->of_q, q, q, n * layer->heads, layer->dim);
        normalise(&layer->of_k, k, k, n * layer->cached, layer->dim);
    }
    rotate(q, cosine, sine, step, n, layer->heads, layer->dim);
    rotate(k, cosine, sine, step, n, layer->cached, layer->dim);
}

/* softmax(scaling q K^T) V for q [n, heads, dim], K and V [n, cached, length, dim]; what seen [n, length] denies counts
 * nothing. */
static void attend(const struct layer *layer, const float *q, const float *keys, const float *values, const uint8_t *seen,
                   float *to, float *room, ptrdiff_t n, ptrdiff_t length)
{
    const ptrdiff_t heads = layer->heads, dim = layer->dim, each = heads / layer->cached;
    OF_ROWS(n * heads, dim * length)
    for (ptrdiff_t at = 0; at < n * heads; at++) {
        const ptrdiff_t text = at / heads, pair = text * layer->cached + at % heads / each;
        const float *key = keys + pair * length * dim, *value = values + pair * length * dim, *query = q + at * dim;
        const uint8_t *allowed = seen ? seen + text * length : NULL;
        float *weights = room + at * length, *h = to + at * dim;
        float largest = -INFINITY, sum = 0;
        for (ptrdiff_t t = 0; t < length; t++) {
            float score = 0;
            for (ptrdiff_t k = 0; k < dim; k++)
                score += query[k] * key[t * dim + k];
            weights[t] = allowed && !allowed[t] ? -INFINITY : score * layer->scaling;
            largest = weights[t] > largest ? weights[t] : largest;
        }
        for (ptrdiff_t t = 0; t < length; t++)
            weights[t] = exponential(weights[t] - largest);
        for (ptrdiff_t t = 0; t < length; t++)
            sum += weights[t];
        for (ptrdiff_t k = 0; k < dim; k++)
            h[k] = 0;
        for (ptrdiff_t t = 0; t < length; t++) {
            const float share = allowed && !allowed[t] ? 0.0f : weights[t] / sum;
            for (ptrdiff_t k = 0; k < dim; k++)
                h[k] += share * value[t * dim + k];
        }
    }
}

/* h [n, hidden] = x + o(attention), and then + down(silu(gate) up) of its norm. */
void after_attention(const struct layer *layer, const float *x, const float *q, const float *keys, const float *values,
                     const uint8_t *seen, float *h, float *room, ptrdiff_t n, ptrdiff_t length)
{
    const ptrdiff_t hidden = layer->o.out, inner = layer->gate.out;
    float *mixed = room, *normed = mixed + n * layer->o.in, *gate = normed + n * hidden, *up = gate + n * inner,
          *low = up + n * inner;
    attend(layer, q, keys, values, seen, mixed, gate, n, length);
    multiply(&layer->o, mixed, h, low, n);
    for (ptrdiff_t k = 0; k < n * hidden; k++)
        h[k] += x[k];
    normalise(&layer->after, h, normed, n, hidden);
    multiply(&layer->gate, normed, gate, low, n);
    multiply(&layer->up, normed, up, low, n);
    for (ptrdiff_t k = 0; k < n * inner; k++)
        gate[k] = gate[k] / (1.0f + exponential(-gate[k])) * up[k];
    multiply(&layer->down, gate, normed, low, n);
    for (ptrdiff_t k = 0; k < n * hidden; k++)
        h[k] += normed[k];
}
