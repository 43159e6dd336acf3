/* A frozen linear layer and its low-rank update in training, forward and backward, in fp32 or with a weight in 16 or 8 bits.
 *
 * The equations are those of kernels/lora_linear.py, which is the reference, to the bit.
 */
#include "training.h"
#if defined(__AVX2__)

static ptrdiff_t max_of(ptrdiff_t a, ptrdiff_t b)
{
    return a > b ? a : b;
}

/* Bytes of [n, depth] rounded and packed: 16 bits for a product, 16 or 8 for a gradient. */
static ptrdiff_t packed_bytes(int product, ptrdiff_t n, ptrdiff_t depth)
{
    if (product == LK_AMX)
        return max_of(lk_packed_a16_amx_size(n, depth), (LK_GROUP + 4) * lk_packed_a8_amx_groups(n, depth));
    return max_of(2 * lk_packed_a16_size(n, depth), (LK_GROUP + 8) * lk_packed_a8_groups(n, depth));
}

/* Bytes of an input or gradient of any of LK_LINEARS layers, packed. */
ptrdiff_t lk_training_packed(const struct lk_training_layer *layer)
{
    ptrdiff_t rank = 0, bytes = 0;
    for (int i = 0; i < LK_LINEARS; i++) {
        const struct lk_linear *own = &layer->linears[i].linear;
        rank = max_of(rank, own->rank);
        if (own->row_scale)
            bytes = max_of(bytes, packed_bytes(layer->linears[i].product, layer->n, max_of(own->in, own->out)));
    }
    return max_of(bytes, (ptrdiff_t)sizeof(float) * lk_packed_f32_size(max_of(layer->n, rank)));
}

/* The workspace that is large enough for each of LK_LINEARS layers. */
struct linear_scratch take_linear_scratch(struct arena *arena, const struct lk_training_layer *layer)
{
    ptrdiff_t widest = 0, dropped = 0, rank = 0;
    for (int i = 0; i < LK_LINEARS; i++) {
        const struct lk_linear *own = &layer->linears[i].linear;
        widest = max_of(widest, own->out);
        rank = max_of(rank, own->rank + own->outliers);
        if (layer->linears[i].levels)
            dropped = max_of(dropped, own->in);
    }
    struct linear_scratch made;
    made.wide = take(arena, layer->n * dropped);
    made.thin = take(arena, layer->n * rank);
    made.turned = take(arena, layer->n * rank);
    made.across = take(arena, rank * widest);
    made.scale = take(arena, layer->n);
    made.packed = layer->packed;
    made.seconds = layer->seconds;
    return made;
}

/* x [n, in] after dropout, in `to` unless there is none. */
static const float *after_dropout(const struct lk_trained_linear *layer, const float *x, float *to, ptrdiff_t n)
{
    if (!layer->levels)
        return x;
    lk_dropout(x, to, n * layer->linear.in, layer->low, layer->high, layer->levels, layer->keep, 0);
    return to;
}

/* Low-rank tokens scaling u and outlier columns of x side by side, [n, rank + outliers]. */
static void low_rank_tokens(const struct lk_linear *own, const float *u, const float *x, float *to, ptrdiff_t n)
{
    const ptrdiff_t rank = own->rank, all = rank + own->outliers;
    PARALLEL_ROWS(n, all)
    for (ptrdiff_t i = 0; i < n; i++) {
        for (ptrdiff_t r = 0; r < rank; r++)
            to[i * all + r] = u[i * rank + r] * own->scaling;
        for (ptrdiff_t k = 0; k < own->outliers; k++)
            to[i * all + rank + k] = x[i * own->in + (ptrdiff_t)own->outlier_positions[k]];
    }
}

/* from [rows, columns] -> to [columns, rows], times a factor. */
static void transpose(const float *from, float *to, ptrdiff_t rows, ptrdiff_t columns, float factor)
{
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t j = 0; j < columns; j++)
            to[j * rows + i] = from[i * columns + j] * factor;
}

/* h = x W8^T + bias + the low-rank tokens times B^T and the outlier columns. */
static void int8_product(const struct lk_trained_linear *layer, const float *x, float *h, ptrdiff_t n,
                         const struct linear_scratch *scratch)
{
    const struct lk_linear *own = &layer->linear;
    const ptrdiff_t out = own->out, in = own->in;
    const ptrdiff_t all = own->rank + own->outliers, fused = all <= LK_MAX_FUSED_RANK ? all : 0;
    const float *u = fused ? scratch->thin : NULL, *v = fused ? scratch->across : NULL;
    if (own->rank)
        transpose(own->b, scratch->across, own->out, own->rank, 1.0f);
    if (own->outliers)
        memcpy(scratch->across + own->rank * own->out, own->outlier_values,
               (size_t)(own->outliers * own->out) * sizeof(float));
    if (layer->product == LK_AMX) {
        int8_t *tiles = (int8_t *)scratch->packed;
        lk_pack_a16_amx(x, own->column_scale, tiles, scratch->scale, n, own->in, 0);
        lap(scratch->seconds, ROUNDING);
        lk_gemm_w8a16_amx(tiles, scratch->scale, own->weight, own->row_scale, own->bias, u, v, fused, h, n, out, in);
        lap(scratch->seconds, PRODUCT);
    } else {
        int16_t *strips = (int16_t *)scratch->packed;
        lk_pack_a16(x, own->column_scale, strips, scratch->scale, n, own->in, 0);
        lap(scratch->seconds, ROUNDING);
        lk_gemm_w8a16(strips, scratch->scale, own->weight, own->row_scale, own->bias, u, v, fused, h, n, out, in, 0);
        lap(scratch->seconds, PRODUCT);
    }
    if (all > fused)
        lk_gemm_f32(scratch->thin, scratch->across, NULL, scratch->packed, h, n, all, own->out, 0, 0, 1);
    lap(scratch->seconds, LOW_RANK);
}

/* h [n, columns] = x m + bias, for the fp32 or 16-bit weight of a layer: m is W^T if `transposed`, else W. */
static void wide_product(const struct lk_trained_linear *layer, const float *x, const float *bias, float *h, ptrdiff_t n,
                         int transposed, const struct linear_scratch *scratch)
{
    const struct lk_linear *own = &layer->linear;
    const ptrdiff_t depth = transposed ? own->in : own->out, columns = transposed ? own->out : own->in;
    if (layer->product == LK_BF16 || layer->product == LK_FP16)
        lk_gemm_half(x, (const uint16_t *)own->weight, bias, scratch->packed, h, n, depth, columns, transposed,
                     layer->product == LK_BF16);
    else
        lk_gemm_f32(x, (const float *)own->weight, bias, scratch->packed, h, n, depth, columns, transposed, 0, 0);
}

/* h [n, out] = x W^T + bias + scaling dropout(x) A^T B^T, and u [n, rank] = dropout(x) A^T, which is kept. h may be
 * NULL where only u is wanted. */
void trained_linear(const struct lk_trained_linear *layer, const float *x, float *u, float *h, ptrdiff_t n,
                    const struct linear_scratch *scratch)
{
    const struct lk_linear *own = &layer->linear;
    float *packed = scratch->packed;
    if (own->rank) {
        const float *input = after_dropout(layer, x, scratch->wide, n);
        lk_gemm_f32(input, own->a, NULL, packed, u, n, own->in, own->rank, 1, 1, 0);
    }
    lap(scratch->seconds, LOW_RANK);
    if (!h)
        return;
    low_rank_tokens(own, u, x, scratch->thin, n);
    lap(scratch->seconds, LOW_RANK);
    if (own->row_scale) {
        int8_product(layer, x, h, n, scratch);
        return;
    }
    wide_product(layer, x, own->bias, h, n, 1, scratch);
    lap(scratch->seconds, PRODUCT);
    if (own->rank)
        lk_gemm_f32(scratch->thin, own->b, NULL, packed, h, n, own->rank, own->out, 1, 1, 1);
    lap(scratch->seconds, LOW_RANK);
}

/* dx [n, in] = g W. */
static void input_gradient(const struct lk_trained_linear *layer, const float *g, float *dx, ptrdiff_t n,
                           const struct linear_scratch *scratch)
{
    const struct lk_linear *own = &layer->linear;
    const ptrdiff_t out = own->out, in = own->in;
    int8_t *codes = (int8_t *)scratch->packed;
    const int feedback = !own->column_scale;
    if (!own->row_scale) {
        wide_product(layer, g, NULL, dx, n, 0, scratch);
        lap(scratch->seconds, GRADIENT);
        return;
    }
    if (layer->product == LK_AMX) {
        float *scale = (float *)(codes + LK_GROUP * lk_packed_a8_amx_groups(n, out));
        lk_pack_a8_amx(g, own->row_scale, codes, scale, n, out, feedback);
        lap(scratch->seconds, ROUNDING);
        lk_gemm_w8a8_amx_dgrad(codes, scale, own->weight, own->column_scale, dx, n, out, in);
    } else if (layer->product == LK_VNNI) {
        const ptrdiff_t groups = lk_packed_a8_groups(n, out);
        float *scale = (float *)(codes + LK_GROUP * groups);
        int32_t *start = (int32_t *)(scale + groups);
        lk_pack_a8_grouped(g, own->row_scale, codes, scale, start, n, out, feedback);
        lap(scratch->seconds, ROUNDING);
        lk_gemm_w8a8_grouped_dgrad(codes, scale, start, own->weight, own->column_scale, dx, n, out, in);
    } else {
        int16_t *strips = (int16_t *)codes;
        lk_pack_a16(g, own->row_scale, strips, scratch->scale, n, out, feedback);
        lap(scratch->seconds, ROUNDING);
        lk_gemm_w8a16(strips, scratch->scale, own->weight, own->column_scale, NULL, NULL, NULL, 0, dx, n, out, in, 1);
    }
    if (own->outliers)
        lk_outlier_dgrad(g, own->outlier_values, own->outlier_positions, dx, n, out, in, own->outliers);
    lap(scratch->seconds, GRADIENT);
}

/* dx += dropout^T(gu A), gu [n, rank]. */
static void add_update(const struct lk_trained_linear *layer, const float *gu, float *dx, ptrdiff_t n,
                       const struct linear_scratch *scratch)
{
    const struct lk_linear *own = &layer->linear;
    float *to = layer->levels ? scratch->wide : dx;
    const int low_rank = layer->levels || !own->row_scale; /* as lora_linear.py has it */
    lk_gemm_f32(gu, own->a, NULL, scratch->packed, to, n, own->rank, own->in, 0, low_rank, to == dx);
    if (layer->levels)
        lk_dropout(to, dx, n * own->in, layer->low, layer->high, layer->levels, layer->keep, 1);
}

/* Gradients of g [n, out] to the input, dx [n, in] unless it is NULL, and to A and B where they are wanted. */
void trained_linear_backward(const struct lk_trained_linear *layer, const float *g, const float *x, const float *u,
                             float *dx, ptrdiff_t n, const struct linear_scratch *scratch)
{
    const struct lk_linear *own = &layer->linear;
    const ptrdiff_t rank = own->rank;
    float *gu = scratch->thin, *packed = scratch->packed;
    if (rank && (dx || layer->da)) {
        lk_gemm_f32(g, own->b, NULL, packed, gu, n, own->out, rank, 0, 1, 0);
        for (ptrdiff_t i = 0; i < n * rank; i++)
            gu[i] *= own->scaling;
    }
    lap(scratch->seconds, LOW_RANK);
    if (dx)
        input_gradient(layer, g, dx, n, scratch);
    if (dx && rank)
        add_update(layer, gu, dx, n, scratch);
    if (layer->da) {
        transpose(gu, scratch->turned, n, rank, 1.0f);
        const float *input = after_dropout(layer, x, scratch->wide, n);
        lk_gemm_f32(scratch->turned, input, NULL, packed, layer->da, rank, n, own->in, 0, 1, 0);
    }
    if (layer->db) {
        transpose(u, scratch->turned, n, rank, 1.0f);
        lk_gemm_f32(scratch->turned, g, NULL, packed, scratch->across, rank, n, own->out, 0, 1, 0);
        transpose(scratch->across, layer->db, rank, own->out, own->scaling);
    }
    lap(scratch->seconds, LOW_RANK);
}
#endif
