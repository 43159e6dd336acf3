/* One new token of each of n texts through a decoder layer of the Llama family with int8 or NF4 weights.
 *
 * Two calls, before and after attention: the cache appends the new key and value between them. The products are
 * lk_gemv_w8() and lk_gemv_nf4(); everything else is a single pass over small vectors. Reference: the layer's own forward
 * (inference/fast_decode.py compares).
 */
#include "common.h"
#include <math.h>

/* h [n, out] from x [n, in]; `low_rank` is a workspace of n * rank values. */
static void decoder_linear(const struct lk_linear *l, const float *x, float *h, float *low_rank, ptrdiff_t n)
{
    if (l->absmax)
        lk_gemv_nf4(x, (const uint8_t *)l->weight, l->absmax, l->nested, l->bias, h, n, l->out, l->in);
    else
        lk_gemv_w8(x, l->weight, l->row_scale, l->column_scale, l->bias, h, n, l->out, l->in);
    for (ptrdiff_t at = 0; at < n * l->outliers; at++) {
        const ptrdiff_t i = at / l->outliers, c = at % l->outliers;
        const float one = x[i * l->in + (ptrdiff_t)l->outlier_positions[c]];
        for (ptrdiff_t j = 0; j < l->out; j++)
            h[i * l->out + j] += one * l->outlier_values[c * l->out + j];
    }
    for (ptrdiff_t at = 0; at < n * l->rank; at++) {
        const float *row = x + at / l->rank * l->in, *a = l->a + at % l->rank * l->in;
        float sum = 0;
        for (ptrdiff_t k = 0; k < l->in; k++)
            sum += row[k] * a[k];
        low_rank[at] = sum * l->scaling;
    }
    for (ptrdiff_t i = 0; l->rank && i < n; i++)
        for (ptrdiff_t j = 0; j < l->out; j++) {
            float sum = 0;
            for (ptrdiff_t r = 0; r < l->rank; r++)
                sum += low_rank[i * l->rank + r] * l->b[j * l->rank + r];
            h[i * l->out + j] += sum;
        }
    for (ptrdiff_t i = 0; l->output && i < n; i++)
        for (ptrdiff_t j = 0; j < l->out; j++)
            h[i * l->out + j] = l->output[j] * h[i * l->out + j] + l->output[l->out + j];
}

/* to = x / sqrt(mean(x^2) + eps) * weight for rows x [n, width]; `to` may be x. */
static void decoder_norm(const struct lk_norm *norm, const float *x, float *to, ptrdiff_t n, ptrdiff_t width)
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
static void decoder_rotate(float *x, const float *cosine, const float *sine, ptrdiff_t step, ptrdiff_t n, ptrdiff_t heads,
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

/* x [n, hidden] -> q [n, heads, dim], k and v [n, kv_heads, dim]. Cosine and sine are [dim], `step` floats apart from text
 * to text. */
void lk_before_attention(const struct lk_layer *layer, const float *x, const float *cosine, const float *sine,
                         ptrdiff_t step, float *q, float *k, float *v, float *workspace, ptrdiff_t n)
{
    float *normed = workspace, *low_rank = normed + n * layer->q.in;
    decoder_norm(&layer->before, x, normed, n, layer->q.in);
    decoder_linear(&layer->q, normed, q, low_rank, n);
    decoder_linear(&layer->k, normed, k, low_rank, n);
    decoder_linear(&layer->v, normed, v, low_rank, n);
    if (layer->of_q.weight) {
        decoder_norm(&layer->of_q, q, q, n * layer->heads, layer->head_width);
        decoder_norm(&layer->of_k, k, k, n * layer->kv_heads, layer->head_width);
    }
    decoder_rotate(q, cosine, sine, step, n, layer->heads, layer->head_width);
    decoder_rotate(k, cosine, sine, step, n, layer->kv_heads, layer->head_width);
}

/* softmax(scaling q K^T) V for q [n, heads, dim], K and V [n, kv_heads, length, dim]; keys that `seen` [n, length] denies
 * are masked. */
static void decoder_attend(const struct lk_layer *layer, const float *q, const float *keys, const float *values,
                           const uint8_t *seen, float *to, float *workspace, ptrdiff_t n, ptrdiff_t length)
{
    const ptrdiff_t heads = layer->heads, dim = layer->head_width, each = heads / layer->kv_heads;
    PARALLEL_ROWS(n * heads, dim * length)
    for (ptrdiff_t at = 0; at < n * heads; at++) {
        const ptrdiff_t text = at / heads, kv = text * layer->kv_heads + at % heads / each;
        const float *key = keys + kv * length * dim, *value = values + kv * length * dim, *query = q + at * dim;
        const uint8_t *allowed = seen ? seen + text * length : NULL;
        float *weights = workspace + at * length, *h = to + at * dim;
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
void lk_after_attention(const struct lk_layer *layer, const float *x, const float *q, const float *keys,
                        const float *values, const uint8_t *seen, float *h, float *workspace, ptrdiff_t n,
                        ptrdiff_t length)
{
    const ptrdiff_t hidden = layer->o.out, inner = layer->gate.out;
    float *mixed = workspace, *normed = mixed + n * layer->o.in, *gate = normed + n * hidden, *up = gate + n * inner,
          *low_rank = up + n * inner;
    decoder_attend(layer, q, keys, values, seen, mixed, gate, n, length);
    decoder_linear(&layer->o, mixed, h, low_rank, n);
    for (ptrdiff_t k = 0; k < n * hidden; k++)
        h[k] += x[k];
    decoder_norm(&layer->after, h, normed, n, hidden);
    decoder_linear(&layer->gate, normed, gate, low_rank, n);
    decoder_linear(&layer->up, normed, up, low_rank, n);
    for (ptrdiff_t k = 0; k < n * inner; k++)
        gate[k] = gate[k] / (1.0f + exponential(-gate[k])) * up[k];
    decoder_linear(&layer->down, gate, normed, low_rank, n);
    for (ptrdiff_t k = 0; k < n * hidden; k++)
        h[k] += normed[k];
}
