/* A decoder layer of the Llama family in training, forward and backward in one call each.
 *
 *     a = x + o(attention(rotary(q(n)), rotary(k(n)), v(n)))      n = norm(x)
 *     h = a + down(f(gate(m)) up(m))                              m = norm(a)
 *
 * Each step is a loop or product of another file. Reference: the layer's own modules, to the bit.
 */
#include "training.h"
#if defined(__AVX2__)

/* Values for the backward pass. */
struct kept {
    float *of_before, *of_after;       /* [n]: the factor of each row in a norm */
    float *q, *k, *v, *attended, *log; /* after rotation; the output of attention, and log sum exp of its scores */
    float *middle;                     /* [n, hidden]: after attention */
    float *gate, *up;                  /* [n, inner], fp32 or bf16 */
    float *gated;                      /* [n, inner]: input of down; NULL: not kept */
    float *u[LK_LINEARS];
};

static struct kept take_kept(struct arena *arena, const struct lk_training_layer *layer)
{
    const struct lk_linear *q = &layer->linears[Q].linear, *k = &layer->linears[K].linear;
    const ptrdiff_t n = layer->n, hidden = q->in, inner = layer->linears[GATE].linear.out;
    const ptrdiff_t gates = layer->narrow ? (n * inner + 1) / 2 : n * inner;
    struct kept kept;
    kept.of_before = take(arena, n);
    kept.of_after = take(arena, n);
    kept.q = take(arena, n * q->out);
    kept.k = take(arena, n * k->out);
    kept.v = take(arena, n * k->out);
    kept.attended = take(arena, n * q->out);
    kept.log = take(arena, n * layer->attention.heads);
    kept.middle = take(arena, n * hidden);
    kept.gate = take(arena, gates);
    kept.up = take(arena, gates);
    kept.gated = layer->linears[DOWN].learns ? take(arena, n * inner) : NULL;
    for (int i = 0; i < LK_LINEARS; i++)
        kept.u[i] = take(arena, n * layer->linears[i].linear.rank);
    return kept;
}

static ptrdiff_t max_of(ptrdiff_t a, ptrdiff_t b)
{
    return a > b ? a : b;
}

/* Workspace of the forward pass; the halves of the layer share memory. */
struct forward_scratch {
    struct linear_scratch linear;
    float *normal;             /* [n, hidden]: the output of a norm */
    float *q, *k;              /* before rotation */
    float *gate, *up, *gated;  /* where they are not kept, or in bf16 */
};

static struct forward_scratch take_forward(struct arena *arena, const struct lk_training_layer *layer)
{
    const struct lk_linear *q = &layer->linears[Q].linear, *k = &layer->linears[K].linear;
    const ptrdiff_t n = layer->n, inner = layer->linears[GATE].linear.out;
    struct forward_scratch s = {.linear = take_linear_scratch(arena, layer)};
    s.normal = take(arena, n * q->in);
    struct arena second = *arena;
    s.q = take(arena, n * q->out);
    s.k = take(arena, n * k->out);
    s.gate = take(&second, layer->narrow ? n * inner : 0);
    s.up = take(&second, layer->narrow ? n * inner : 0);
    s.gated = take(&second, layer->linears[DOWN].learns ? 0 : n * inner);
    arena->used = max_of(arena->used, second.used);
    return s;
}

/* Workspace of the backward pass: gradients. The halves of the layer share memory, and so do values that are not alive
 * together. */
struct backward_scratch {
    struct linear_scratch linear;
    float *middle, *normal;      /* [n, hidden]: to what is between the halves; to the output of a norm */
    float *input;                /* [n, hidden]: that output itself, computed again */
    float *gated, *gate, *up;    /* [n, inner] */
    float *attended, *q, *k, *v; /* [n, width of q]: k and v for all heads of q */
    float *other;                /* [n, hidden] */
};

static struct backward_scratch take_backward(struct arena *arena, const struct lk_training_layer *layer)
{
    const ptrdiff_t n = layer->n, inner = layer->linears[GATE].linear.out;
    const ptrdiff_t hidden = layer->linears[Q].linear.in, wide = layer->linears[Q].linear.out;
    struct backward_scratch s = {.linear = take_linear_scratch(arena, layer)};
    s.middle = take(arena, n * hidden);
    s.normal = take(arena, n * hidden);
    s.input = take(arena, n * hidden);
    struct arena second = *arena;
    s.gated = take(arena, n * max_of(inner, hidden));
    s.gate = take(arena, n * inner);
    s.up = take(arena, n * inner);
    s.attended = take(&second, n * wide);
    s.q = take(&second, n * wide);
    s.k = take(&second, n * wide);
    s.v = take(&second, n * wide);
    s.other = take(&second, n * hidden);
    arena->used = max_of(arena->used, second.used);
    return s;
}

/* Number of floats that the forward pass keeps. */
ptrdiff_t lk_training_kept(const struct lk_training_layer *layer)
{
    struct arena arena = {NULL, 0};
    take_kept(&arena, layer);
    return arena.used;
}

/* Number of floats of the workspace of a pass. */
ptrdiff_t lk_training_workspace(const struct lk_training_layer *layer, int backward)
{
    struct arena arena = {NULL, 0};
    if (backward)
        take_backward(&arena, layer);
    else
        take_forward(&arena, layer);
    return arena.used;
}

/* y += x, both [size]. */
static void add(const float *x, float *y, ptrdiff_t size)
{
    PARALLEL_ROWS(size, 1)
    for (ptrdiff_t i = 0; i < size; i++)
        y[i] += x[i];
}

static struct lk_heads heads_of(float *data, ptrdiff_t heads, ptrdiff_t width)
{
    return (struct lk_heads){data, heads * width, width};
}

static void linear(const struct lk_training_layer *layer, int which, const float *x, const struct kept *kept, float *h,
                   const struct linear_scratch *scratch)
{
    trained_linear(&layer->linears[which], x, kept->u[which], h, layer->n, scratch);
}

static void linear_backward(const struct lk_training_layer *layer, int which, const float *g, const float *x,
                            const struct kept *kept, float *dx, const struct linear_scratch *scratch)
{
    trained_linear_backward(&layer->linears[which], g, x, kept->u[which], dx, layer->n, scratch);
}

/* x -> kept->middle. */
static void attention_half(const struct lk_training_layer *layer, const struct kept *kept,
                           const struct forward_scratch *s)
{
    const struct lk_attention *shape = &layer->attention;
    const ptrdiff_t n = layer->n, width = shape->head_width, hidden = layer->linears[Q].linear.in;
    float *normal = s->normal;
    lk_rms_norm(layer->x, layer->before.weight, normal, kept->of_before, n, hidden, layer->before.eps, 0.0f);
    lap(layer->seconds, ELEMENTWISE);
    linear(layer, Q, normal, kept, s->q, &s->linear);
    linear(layer, K, normal, kept, s->k, &s->linear);
    linear(layer, V, normal, kept, kept->v, &s->linear);
    lk_rotary(s->q, layer->cosine, layer->sine, kept->q, n, shape->heads, width / 2, 0);
    lk_rotary(s->k, layer->cosine, layer->sine, kept->k, n, shape->kv_heads, width / 2, 0);
    lap(layer->seconds, ELEMENTWISE);
    const struct lk_heads q = heads_of(kept->q, shape->heads, width), k = heads_of(kept->k, shape->kv_heads, width);
    const struct lk_heads v = heads_of(kept->v, shape->kv_heads, width);
    const struct lk_heads o = heads_of(kept->attended, shape->heads, width);
    lk_attention_forward(&q, &k, &v, &o, kept->log, layer->starts, layer->lengths, layer->samples, shape);
    lap(layer->seconds, ATTENTION);
    linear(layer, O, kept->attended, kept, kept->middle, &s->linear);
    add(layer->x, kept->middle, n * hidden);
    lap(layer->seconds, ELEMENTWISE);
}

/* kept->middle -> out. */
static void feed_forward_half(const struct lk_training_layer *layer, const struct kept *kept,
                              const struct forward_scratch *s, float *out)
{
    const ptrdiff_t n = layer->n, hidden = layer->linears[Q].linear.in, inner = layer->linears[GATE].linear.out;
    float *normal = s->normal, *gated = kept->gated ? kept->gated : s->gated;
    float *gate = layer->narrow ? s->gate : kept->gate, *up = layer->narrow ? s->up : kept->up;
    uint16_t *narrow_gate = layer->narrow ? (uint16_t *)kept->gate : NULL;
    uint16_t *narrow_up = layer->narrow ? (uint16_t *)kept->up : NULL;
    lk_rms_norm(kept->middle, layer->after.weight, normal, kept->of_after, n, hidden, layer->after.eps, 0.0f);
    lap(layer->seconds, ELEMENTWISE);
    linear(layer, GATE, normal, kept, gate, &s->linear);
    linear(layer, UP, normal, kept, up, &s->linear);
    lk_gated(gate, up, gated, narrow_gate, narrow_up, n * inner, layer->activation);
    lap(layer->seconds, ELEMENTWISE);
    linear(layer, DOWN, gated, kept, out, &s->linear);
    if (out)
        add(kept->middle, out, n * hidden);
    lap(layer->seconds, ELEMENTWISE);
}

/* out [n, hidden] of layer->x; out may be NULL where only `kept`, of lk_training_kept floats, is wanted. */
void lk_training_forward(const struct lk_training_layer *layer, float *kept, float *out, float *workspace)
{
    struct arena of_kept = {kept, 0}, of_scratch = {workspace, 0};
    const struct kept parts = take_kept(&of_kept, layer);
    start_laps(layer->seconds);
    const struct forward_scratch scratch = take_forward(&of_scratch, layer);
    attention_half(layer, &parts, &scratch);
    feed_forward_half(layer, &parts, &scratch, out);
}

/* The output of a norm again, where A of a layer that reads it gets a gradient; else NULL. */
static const float *again(const struct lk_training_layer *layer, int from, int to, const float *x,
                          const struct lk_norm *norm, const struct backward_scratch *s)
{
    const ptrdiff_t n = layer->n, width = layer->linears[Q].linear.in;
    for (int i = from; i <= to; i++)
        if (layer->linears[i].da) {
            lk_rms_norm(x, norm->weight, s->input, s->linear.scale, n, width, norm->eps, 0.0f);
            return s->input;
        }
    return NULL;
}

/* The gradient to kept->middle, from `grad` to the output; not computed where nothing below wants it. */
static void feed_forward_backward(const struct lk_training_layer *layer, const struct kept *kept, const float *grad,
                                  float *middle, const struct backward_scratch *s)
{
    const struct lk_trained_linear *all = layer->linears;
    const ptrdiff_t n = layer->n, hidden = all[Q].linear.in, inner = all[GATE].linear.out;
    const int below = middle || wants_gradient(&all[GATE]) || wants_gradient(&all[UP]);
    linear_backward(layer, DOWN, grad, kept->gated, kept, below ? s->gated : NULL, &s->linear);
    if (!below)
        return;
    lk_gated_backward(s->gated, kept->gate, kept->up, s->gate, s->up, n * inner, layer->activation, layer->narrow);
    lap(layer->seconds, ELEMENTWISE);
    const float *input = again(layer, GATE, UP, kept->middle, &layer->after, s);
    linear_backward(layer, UP, s->up, input, kept, middle ? s->normal : NULL, &s->linear);
    float *other = s->gated; /* its gradient has been used */
    linear_backward(layer, GATE, s->gate, input, kept, middle ? other : NULL, &s->linear);
    if (!middle)
        return;
    add(other, s->normal, n * hidden);
    lk_rms_norm_backward(s->normal, kept->middle, layer->after.weight, kept->of_after, middle, n, hidden, 0.0f);
    add(grad, middle, n * hidden);
    lap(layer->seconds, ELEMENTWISE);
}

/* Sum the shares [n, kv_heads, group, width] of the heads that a head of k or v serves -> [n, kv_heads, width]. */
static const float *sum_heads(const float *shares, float *to, const struct lk_attention *shape, ptrdiff_t n)
{
    const ptrdiff_t group = shape->heads / shape->kv_heads, width = shape->head_width;
    if (group == 1)
        return shares;
    PARALLEL_ROWS(n * shape->kv_heads, group * width)
    for (ptrdiff_t i = 0; i < n * shape->kv_heads; i++)
        for (ptrdiff_t d = 0; d < width; d++) {
            float sum = shares[i * group * width + d];
            for (ptrdiff_t g = 1; g < group; g++)
                sum += shares[(i * group + g) * width + d];
            to[i * width + d] = sum;
        }
    return to;
}

/* Gradients to q, k and v before rotation, from s->attended to the output of attention. */
static void attention_backward(const struct lk_training_layer *layer, const struct kept *kept,
                               const struct backward_scratch *s, const float *made[3])
{
    const struct lk_attention *shape = &layer->attention;
    const ptrdiff_t n = layer->n, heads = shape->heads, few = shape->kv_heads, width = shape->head_width;
    const struct lk_heads grad = heads_of(s->attended, heads, width), q = heads_of(kept->q, heads, width);
    const struct lk_heads k = heads_of(kept->k, few, width), v = heads_of(kept->v, few, width);
    const struct lk_heads o = heads_of(kept->attended, heads, width), dq = heads_of(s->q, heads, width);
    const struct lk_heads dk = heads_of(s->k, heads, width), dv = heads_of(s->v, heads, width);
    lk_attention_backward(&grad, &q, &k, &v, &o, kept->log, &dq, &dk, &dv, layer->starts, layer->lengths,
                          layer->samples, shape);
    lap(layer->seconds, ATTENTION);
    float *turned_q = s->attended, *sum_k = s->q, *sum_v = s->q + n * few * width; /* where heads are summed, two fit */
    lk_rotary(s->q, layer->cosine, layer->sine, turned_q, n, heads, width / 2, 1);
    const float *of_k = sum_heads(s->k, sum_k, shape, n);
    float *turned_k = of_k == s->k ? s->q : s->k;
    lk_rotary(of_k, layer->cosine, layer->sine, turned_k, n, few, width / 2, 1);
    made[Q] = turned_q;
    made[K] = turned_k;
    made[V] = sum_heads(s->v, sum_v, shape, n);
    lap(layer->seconds, ELEMENTWISE);
}

/* dx [n, hidden] unless it is NULL, from s->middle to kept->middle. */
static void attention_half_backward(const struct lk_training_layer *layer, const struct kept *kept, float *dx,
                                    const struct backward_scratch *s)
{
    const struct lk_trained_linear *all = layer->linears;
    const ptrdiff_t n = layer->n, hidden = all[Q].linear.in;
    const int below = dx || wants_gradient(&all[Q]) || wants_gradient(&all[K]) || wants_gradient(&all[V]);
    const float *of[3];
    linear_backward(layer, O, s->middle, kept->attended, kept, below ? s->attended : NULL, &s->linear);
    if (!below)
        return;
    attention_backward(layer, kept, s, of);
    const float *input = again(layer, Q, V, layer->x, &layer->before, s);
    linear_backward(layer, V, of[V], input, kept, dx ? s->normal : NULL, &s->linear);
    for (int i = K; i >= Q; i--) {
        linear_backward(layer, i, of[i], input, kept, dx ? s->other : NULL, &s->linear);
        if (dx)
            add(s->other, s->normal, n * hidden);
        lap(layer->seconds, ELEMENTWISE);
    }
    if (!dx)
        return;
    lk_rms_norm_backward(s->normal, layer->x, layer->before.weight, kept->of_before, dx, n, hidden, 0.0f);
    add(s->middle, dx, n * hidden);
    lap(layer->seconds, ELEMENTWISE);
}

/* Gradients of `grad` [n, hidden] to layer->x, dx [n, hidden] unless it is NULL, and to each A and B that wants one. */
void lk_training_backward(const struct lk_training_layer *layer, float *kept, const float *grad, float *dx,
                          float *workspace)
{
    struct arena of_kept = {kept, 0}, of_scratch = {workspace, 0};
    const struct kept parts = take_kept(&of_kept, layer);
    start_laps(layer->seconds);
    const struct backward_scratch scratch = take_backward(&of_scratch, layer);
    int below = dx != NULL;
    for (int i = Q; i <= O; i++)
        below |= wants_gradient(&layer->linears[i]);
    feed_forward_backward(layer, &parts, grad, below ? scratch.middle : NULL, &scratch);
    if (below)
        attention_half_backward(layer, &parts, dx, &scratch);
}
#endif
