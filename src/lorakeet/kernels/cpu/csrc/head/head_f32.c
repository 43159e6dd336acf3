/* The loss of a frozen head in fp32 and its gradient to the input, a chunk of tokens at a time (AVX2, AVX-512).
 *
 * Logits are stored transposed, [vocabulary][tokens]. So rows of the weight are multiplied where they lie, and each lane of a
 * vector has the softmax of a token. All sums have the order of gemm_f32.c and elementwise.c.
 * Reference: kernels/linear_cross_entropy.py. */
#include "../gemm/gemm_f32.h"
#if defined(__AVX2__)

enum {
    HEAD_ROWS = 8 * MR,  /* rows of the weight that a thread takes at a time */
    HEAD_RUN = 1024,     /* exponentials of a token that are added in fp32 before the sum goes on in fp64 */
    HEAD_LANES = VLEN,   /* partial sums of a run */
    HEAD_SCALED = 16     /* rows of the gradient that a thread scales at a time */
};

struct head {
    const float *weight;         /* [vocabulary, width] */
    const int64_t *targets;      /* [n] */
    float *losses;               /* [n] */
    float *z;                    /* [vocabulary][stride]: logits, their exponentials, and the gradient to them */
    float *panels;               /* [NR tokens][width][NR] */
    float *highest;              /* [blocks][stride]: the largest logit in HEAD_ROWS rows */
    float *sums;                 /* [runs][stride]: of exponentials */
    float *largest, *share;      /* [stride]: the largest logit, and scale / the sum of all exponentials */
    ptrdiff_t vocabulary, width, stride, blocks, runs;
    ptrdiff_t n, active;         /* tokens, and these in whole vectors */
    float scale;
};

/* Lay a chunk of `tokens` out in a workspace, or with NULL only count. Returns the number of floats. */
static ptrdiff_t head_take(struct head *h, float *workspace, ptrdiff_t tokens, ptrdiff_t vocabulary, ptrdiff_t width)
{
    h->vocabulary = vocabulary;
    h->width = width;
    h->stride = (tokens + NR - 1) / NR * NR; /* so that each part begins at a multiple of 64 bytes */
    h->blocks = (vocabulary + HEAD_ROWS - 1) / HEAD_ROWS;
    h->runs = (vocabulary + HEAD_RUN - 1) / HEAD_RUN;
    const ptrdiff_t rows[] = {vocabulary, width, h->blocks, h->runs, 1, 1};
    float **parts[] = {&h->z, &h->panels, &h->highest, &h->sums, &h->largest, &h->share};
    ptrdiff_t used = 0;
    for (int i = 0; i < 6; i++) {
        *parts[i] = workspace ? workspace + used : NULL;
        used += rows[i] * h->stride;
    }
    return used;
}

/* Fetch `count` values of each of some rows of the weight, which are read after this tile, into the L2 cache. */
static void head_fetch(const float *rows, ptrdiff_t width, ptrdiff_t from, ptrdiff_t to, ptrdiff_t count)
{
    for (ptrdiff_t r = from; r < to; r++)
        for (ptrdiff_t k = 0; k < count; k += 16)
            __builtin_prefetch(rows + r * width + k, 0, 2);
}

/* Logits of MR rows of the weight from v on. Rows that share sets of the cache, and the last ones, are copied first. */
static void head_strip(const struct head *h, ptrdiff_t v)
{
    const ptrdiff_t width = h->width, size = f32_kc(width), rows = min_of(h->vocabulary - v, MR);
    const float zeros[NR] = {0};
    float edge[MR * F32_ROW_STRIDE];
    for (ptrdiff_t k = 0; k < width; k += size) {
        const ptrdiff_t here = min_of(width - k, size);
        const float *strip = h->weight + v * width + k;
        ptrdiff_t apart = width;
        if (rows < MR || f32_conflicts(width)) {
            memset(edge, 0, sizeof edge);
            for (ptrdiff_t r = 0; r < rows; r++)
                memcpy(edge + r * F32_ROW_STRIDE, strip + r * width, (size_t)here * sizeof(float));
            strip = edge;
            apart = F32_ROW_STRIDE;
        }
        for (ptrdiff_t t = 0; t < h->active; t += NR) {
            const ptrdiff_t to = min_of(t + NR, h->active);
            head_fetch(h->weight + (v + MR) * width + k, width, t * MR / h->active, to * MR / h->active, here);
            f32_tile(strip, apart, 1, h->panels + t * width + k * NR, here, zeros, h->z + v * h->stride + t, h->stride, rows,
                     to - t, k == 0);
        }
    }
}

/* Logits of a block of rows, and the largest of each token. */
static void head_block(const struct head *h, ptrdiff_t block)
{
    const ptrdiff_t first = block * HEAD_ROWS, last = min_of(first + HEAD_ROWS, h->vocabulary);
    float *highest = h->highest + block * h->stride;
    for (ptrdiff_t v = first; v < last; v += MR)
        head_strip(h, v);
    memcpy(highest, h->z + first * h->stride, (size_t)h->active * sizeof(float));
    for (ptrdiff_t v = first + 1; v < last; v++)
        for (ptrdiff_t t = 0; t < h->active; t++) {
            const float each = h->z[v * h->stride + t];
            highest[t] = each > highest[t] ? each : highest[t];
        }
}

/* A run of logits becomes exponentials; their sum for each token. Partial sums are added as a vector's lanes are. */
static void head_exponentials(const struct head *h, ptrdiff_t run)
{
    const ptrdiff_t first = run * HEAD_RUN, last = min_of(first + HEAD_RUN, h->vocabulary);
    for (ptrdiff_t t = 0; t < h->active; t += VLEN) {
        float part[HEAD_LANES][VLEN] = {{0}};
        for (ptrdiff_t v = first; v < last; v++)
            for (ptrdiff_t e = 0; e < VLEN; e++) {
                float *z = h->z + v * h->stride + t + e;
                *z = exponential(h->scale * (*z - h->largest[t + e]));
                part[(v - first) % HEAD_LANES][e] += *z;
            }
        for (ptrdiff_t half = HEAD_LANES / 2; half; half /= 2)
            for (ptrdiff_t l = 0; l < half; l++)
                for (ptrdiff_t e = 0; e < VLEN; e++)
                    part[l][e] += part[l + half][e];
        memcpy(h->sums + run * h->stride + t, part[0], sizeof part[0]);
    }
}

static void head_loss(const struct head *h, ptrdiff_t t, float right)
{
    double total = 0;
    for (ptrdiff_t run = 0; run < h->runs; run++)
        total += (double)h->sums[run * h->stride + t];
    h->share[t] = (float)((double)h->scale / total);
    if (t < h->n)
        h->losses[t] = (float)log(total) - h->scale * (right - h->largest[t]);
}

/* Exponentials of some rows become the gradient to the logits: scale (softmax - onehot(target)). */
static void head_scale(const struct head *h, ptrdiff_t first, ptrdiff_t last)
{
    for (ptrdiff_t v = first; v < last; v++)
        for (ptrdiff_t t = 0; t < h->active; t++)
            h->z[v * h->stride + t] *= h->share[t];
    for (ptrdiff_t t = 0; t < h->n; t++)
        if (h->targets[t] >= first && h->targets[t] < last)
            h->z[h->targets[t] * h->stride + t] -= h->scale;
}

/* dx [n, width] += z^T W for tokens from t to `last`, NR columns of the weight from j on, and `here` rows from k on. */
static void head_gradient(const struct head *h, float *dx, ptrdiff_t t, ptrdiff_t last, ptrdiff_t j, ptrdiff_t k,
                          ptrdiff_t here)
{
    const struct f32_factor m = {h->weight, h->vocabulary, h->width, 0};
    const float zeros[NR] = {0};
    _Alignas(64) float panel[F32_KC * NR];
    f32_pack_panel(&m, panel, j, k, here);
    for (; t < last; t += MR) {
        const ptrdiff_t rows = min_of(last - t, MR);
        head_fetch(h->weight + k * h->width + j + NR, h->width, t * here / h->n, (t + rows) * here / h->n, NR);
        f32_tile(h->z + k * h->stride + t, 1, h->stride, panel, here, zeros, dx + t * h->width + j, h->width, rows,
                 min_of(h->width - j, NR), k == 0);
    }
}

/* Losses of a chunk, and its gradient unless dx is NULL. */
static void head_chunk(const struct head *h, const float *x, float *dx)
{
    const struct f32_factor tokens = {x, h->width, h->n, 1};
    const ptrdiff_t size = f32_kc(h->vocabulary), strips = (h->n + MR - 1) / MR;
    const ptrdiff_t parts = row_parts((h->width + NR - 1) / NR, h->n), each = (strips + parts - 1) / parts * MR;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (ptrdiff_t t = 0; t < h->active; t += NR)
            f32_pack_panel(&tokens, h->panels + t * h->width, t, 0, h->width);
#pragma omp for schedule(dynamic)
        for (ptrdiff_t b = 0; b < h->blocks; b++)
            head_block(h, b);
#pragma omp for schedule(static)
        for (ptrdiff_t t = 0; t < h->active; t++) {
            h->largest[t] = h->highest[t];
            for (ptrdiff_t b = 1; b < h->blocks; b++) {
                const float each = h->highest[b * h->stride + t];
                h->largest[t] = each > h->largest[t] ? each : h->largest[t];
            }
            h->share[t] = t < h->n ? h->z[h->targets[t] * h->stride + t] : 0.0f; /* until the loss is known */
        }
#pragma omp for schedule(static)
        for (ptrdiff_t run = 0; run < h->runs; run++)
            head_exponentials(h, run);
#pragma omp for schedule(static)
        for (ptrdiff_t t = 0; t < h->active; t++)
            head_loss(h, t, h->share[t]);
        for (ptrdiff_t k = 0; dx && k < h->vocabulary; k += size) {
            const ptrdiff_t here = min_of(h->vocabulary - k, size);
#pragma omp for schedule(static)
            for (ptrdiff_t v = k; v < k + here; v += HEAD_SCALED)
                head_scale(h, v, min_of(v + HEAD_SCALED, k + here));
#pragma omp for schedule(static) nowait collapse(2)
            for (ptrdiff_t j = 0; j < h->width; j += NR)
                for (ptrdiff_t part = 0; part < parts; part++)
                    head_gradient(h, dx, part * each, min_of((part + 1) * each, h->n), j, k, here);
        }
    }
}

/* Number of floats of the workspace of lk_head_f32. */
ptrdiff_t lk_head_f32_size(ptrdiff_t tokens, ptrdiff_t vocabulary, ptrdiff_t width)
{
    struct head h;
    return head_take(&h, NULL, tokens, vocabulary, width);
}

/* Losses [n] of x [n, width] at their targets, in chunks of `tokens`: log sum exp(scale z) - scale z_target with z = x W^T,
 * W [vocabulary, width] and scale > 0; and their gradient dx [n, width], unless it is NULL. The workspace has
 * lk_head_f32_size floats. */
void lk_head_f32(const float *x, const float *weight, const int64_t *targets, float *losses, float *dx, float *workspace,
                 ptrdiff_t n, ptrdiff_t vocabulary, ptrdiff_t width, ptrdiff_t tokens, float scale)
{
    struct head h = {.weight = weight, .scale = scale};
    head_take(&h, workspace, tokens, vocabulary, width);
    for (ptrdiff_t i = 0; i < n; i += tokens) {
        h.n = min_of(n - i, tokens);
        h.active = (h.n + VLEN - 1) / VLEN * VLEN;
        h.targets = targets + i;
        h.losses = losses + i;
        head_chunk(&h, x + i * width, dx ? dx + i * width : NULL);
    }
}
#endif
