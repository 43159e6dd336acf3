/* Low-rank updates of adapters in 16 bits: h += B A x, for rows of one adapter together (AVX2, AVX-512).
 *
 * The rows of A and the columns of B are rounded to int16, each with its scale. A step reads all adapters of its rows, and
 * half the bytes take half the time. Each row's sums have one order, whatever rows are computed with it. Reference:
 * kernels/paged.py.
 */
#include "paged.h"
#if defined(__AVX2__)

enum {
    UPDATE_RANKS = 4,          /* rows of A in a tile */
    UPDATE_WIDTH = 4 * VLEN,   /* outputs in a tile */
    UPDATE_ROWS = VLEN / 4,    /* rows of x in a tile, at most: its sums A x are VLEN vectors, which fold into one */
    UPDATE_MOST = INT16_MAX - 1 /* largest code */
};

static inline ptrdiff_t update_padded(ptrdiff_t size, ptrdiff_t step)
{
    return (size + step - 1) / step * step;
}

/* Number of int16 values of A as it is packed. */
static inline ptrdiff_t update_a_size(ptrdiff_t rank, ptrdiff_t in)
{
    return update_padded(rank, UPDATE_RANKS) * update_padded(in, VLEN);
}

/* Number of int16 values that lk_pack_update writes. */
ptrdiff_t lk_packed_update_size(ptrdiff_t rank, ptrdiff_t out, ptrdiff_t in)
{
    return update_a_size(rank, in) + rank * update_padded(out, UPDATE_WIDTH);
}

/* The bits of a magnitude, which order as the values do, with infinity and NaN on top. */
static inline int32_t update_bits(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & INT32_MAX;
}

/* The scale of values, by the bits of their largest magnitude: 1 for zeros, NaN if one is not finite. */
static float update_scale(int32_t bits)
{
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    return !isfinite(largest) ? NAN : largest >= UPDATE_MOST * FLT_MIN ? largest / UPDATE_MOST : 1.0f;
}

/* Round values that follow each other to codes; zeros for a scale that is NaN. */
static inline void update_codes(const float *restrict values, float scale, int16_t *restrict to, ptrdiff_t count)
{
    for (ptrdiff_t k = 0; isfinite(scale) && k < count; k++)
        to[k] = (int16_t)(int32_t)rintf(values[k] / scale);
}

/* A row of A -> codes; returns its scale. */
static float update_pack_a(const float *a, int16_t *codes, ptrdiff_t in)
{
    int32_t bits = 0;
    for (ptrdiff_t k = 0; k < in; k++)
        bits = update_bits(a[k]) > bits ? update_bits(a[k]) : bits;
    const float scale = update_scale(bits);
    for (ptrdiff_t k = 0; k < in; k += VLEN, codes += UPDATE_RANKS * VLEN)
        if (k + VLEN <= in)
            update_codes(a + k, scale, codes, VLEN);
        else
            update_codes(a + k, scale, codes, in - k);
    return scale;
}

/* A column of B, whose values are `rank` apart -> codes; returns its scale. */
static float update_pack_b(const float *b, int16_t *codes, ptrdiff_t rank, ptrdiff_t out)
{
    float column[UPDATE_WIDTH];
    int32_t bits = 0;
    for (ptrdiff_t j = 0; j < out; j++)
        bits = update_bits(b[j * rank]) > bits ? update_bits(b[j * rank]) : bits;
    const float scale = update_scale(bits);
    for (ptrdiff_t j = 0; j < out; j += UPDATE_WIDTH, codes += rank * UPDATE_WIDTH) {
        memset(column, 0, sizeof column);
        for (ptrdiff_t e = 0; e < min_of(out - j, UPDATE_WIDTH); e++)
            column[e] = b[(j + e) * rank];
        update_codes(column, scale, codes, UPDATE_WIDTH);
    }
    return scale;
}

/* A [rank, in] and B [out, rank] -> codes, padded with zeros, and a factor of each product A x: both scales and `scaling`.
 * A is packed as [tile][in / VLEN][UPDATE_RANKS][VLEN], and B behind it as [tile][rank][UPDATE_WIDTH]. */
void lk_pack_update(const float *a, const float *b, float scaling, int16_t *codes, float *scale, ptrdiff_t rank,
                    ptrdiff_t out, ptrdiff_t in)
{
    int16_t *to_b = codes + update_a_size(rank, in);
    memset(codes, 0, (size_t)lk_packed_update_size(rank, out, in) * sizeof(int16_t));
    for (ptrdiff_t r = 0; r < rank; r++) {
        int16_t *to_a = codes + r / UPDATE_RANKS * UPDATE_RANKS * update_padded(in, VLEN) + r % UPDATE_RANKS * VLEN;
        const float of_a = update_pack_a(a + r * in, to_a, in);
        scale[r] = of_a * update_pack_b(b + r, to_b + r * UPDATE_WIDTH, rank, out) * scaling;
    }
}

static inline floats update_widen(const int16_t *codes)
{
#if VLEN == 16
    return TO_FP32(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)codes)));
#else
    return TO_FP32(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)codes)));
#endif
}

/* sum + x y. The operations are fixed here, since a compiler could choose others in each tile. */
static inline floats update_add(floats sum, floats x, floats y)
{
#if defined(__FMA__) && VLEN == 16
    return (floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
    floats product = x * y;
    __asm__("" : "+v"(product));
    return sum + product;
#endif
}

/* The tiles are compiled for each number of rows, so that their sums stay in registers. */
#define UPDATE_TILE static inline __attribute__((always_inline)) void

/* u [rows, UPDATE_RANKS] = scale A x for x [rows, in] and a tile of A; rows of u are `stride` apart. */
UPDATE_TILE update_shrink(const int rows, const int16_t *a, const float *scale, ptrdiff_t ranks, const float *x,
                          ptrdiff_t in, float *u, ptrdiff_t stride)
{
    floats sums[VLEN] = {{0}};
    int32_vector folded[VLEN];
    float made[VLEN];
    for (ptrdiff_t k = 0; k < in; k += VLEN, a += UPDATE_RANKS * VLEN) {
        floats given[UPDATE_ROWS];
        for (int i = 0; i < rows; i++)
            given[i] = k + VLEN <= in ? load(x + i * in + k) : (floats)load_scaled(x + i * in + k, NULL, in - k);
        for (int r = 0; r < UPDATE_RANKS; r++) {
            const floats weight = update_widen(a + r * VLEN);
            for (int i = 0; i < rows; i++)
                sums[i * UPDATE_RANKS + r] = update_add(sums[i * UPDATE_RANKS + r], given[i], weight);
        }
    }
    memcpy(folded, sums, sizeof folded);
    store(made, (floats)fold_fp32(folded));
    for (int i = 0; i < rows; i++)
        for (ptrdiff_t r = 0; r < ranks; r++)
            u[i * stride + r] = made[i * UPDATE_RANKS + r] * scale[r];
}

/* h [rows, UPDATE_WIDTH] += u [rows, rank] B for a tile of B, of which `left` outputs exist. */
UPDATE_TILE update_expand(const int rows, const int16_t *b, const float *u, ptrdiff_t stride, ptrdiff_t rank, float *h,
                          ptrdiff_t out, ptrdiff_t left)
{
    floats sums[UPDATE_ROWS][4];
    for (int i = 0; i < rows; i++)
        for (int e = 0; e < 4; e++)
            sums[i][e] = left >= UPDATE_WIDTH ? load(h + i * out + e * VLEN)
                                              : (floats)load_scaled(h + i * out + e * VLEN, NULL, left - e * VLEN);
    for (ptrdiff_t r = 0; r < rank; r++, b += UPDATE_WIDTH)
        for (int e = 0; e < 4; e++) {
            const floats weight = update_widen(b + e * VLEN);
            for (int i = 0; i < rows; i++)
                sums[i][e] = update_add(sums[i][e], (floats){0} + u[i * stride + r], weight);
        }
    for (int i = 0; i < rows; i++) {
        float edge[UPDATE_WIDTH], *to = left >= UPDATE_WIDTH ? h + i * out : edge;
        for (int e = 0; e < 4; e++)
            store(to + e * VLEN, sums[i][e]);
        if (left < UPDATE_WIDTH)
            memcpy(h + i * out, edge, (size_t)left * sizeof(float));
    }
}

#define UPDATE_FOR(ROWS)                                                                                               \
    static __attribute__((noinline)) void update_##ROWS(const struct lk_update *update, const float *x, float *h,      \
                                                        float *u, ptrdiff_t stride, ptrdiff_t in, ptrdiff_t out)       \
    {                                                                                                                  \
        const ptrdiff_t rank = update->rank, depth = update_padded(in, VLEN);                                          \
        const int16_t *b = update->codes + update_a_size(rank, in);                                                    \
        for (ptrdiff_t r = 0; r < rank; r += UPDATE_RANKS)                                                             \
            update_shrink(ROWS, update->codes + r * depth, update->scale + r, min_of(rank - r, UPDATE_RANKS), x, in,   \
                          u + r, stride);                                                                              \
        for (ptrdiff_t j = 0; j < out; j += UPDATE_WIDTH)                                                              \
            update_expand(ROWS, b + j * rank, u, stride, rank, h + j, out, out - j);                                   \
    }
UPDATE_FOR(1)
UPDATE_FOR(2)
#if VLEN == 16
UPDATE_FOR(4)
#endif

/* h [out] = factor h + added, for the outputs of one row. */
static __attribute__((noinline)) void update_output(float *restrict h, const float *restrict factor,
                                                    const float *restrict added, ptrdiff_t out)
{
    for (ptrdiff_t j = 0; j < out; j++)
        h[j] = factor[j] * h[j] + added[j];
}

/* h [rows, out] += B A x for x [rows, in], and what else the adapter does to outputs. u is a workspace of rows * stride
 * floats; stride is at least the rank. */
void paged_update(const struct lk_update *update, const float *x, float *h, float *u, ptrdiff_t stride, ptrdiff_t rows,
                  ptrdiff_t in, ptrdiff_t out)
{
    ptrdiff_t i = 0;
#if VLEN == 16
    for (; i + 4 <= rows; i += 4)
        update_4(update, x + i * in, h + i * out, u, stride, in, out);
#endif
    for (; i + 2 <= rows; i += 2)
        update_2(update, x + i * in, h + i * out, u, stride, in, out);
    for (; i < rows; i++)
        update_1(update, x + i * in, h + i * out, u, stride, in, out);
    for (i = 0; update->output && i < rows; i++)
        update_output(h + i * out, update->output, update->output + out, out);
}

/* The thread that completes a tile. */
int paged_owner(const struct paged_space *s, const struct paged_tile *t, int threads)
{
    return (int)(t->middle / s->work * (float)threads);
}

/* The updates that complete the products of a group, for each thread that has rows of their adapter. Returns their
 * number. */
ptrdiff_t paged_later_updates(const struct lk_paged *p, const struct paged_space *s, const struct paged_group *g,
                              struct a16_later *to)
{
    ptrdiff_t ranges = 0;
    for (const struct paged_tile *t = s->tiles; t < s->tiles + s->tile_count; t++) {
        const struct lk_update *adapter = p->updates[t->first];
        const int owner = paged_owner(s, t, paged_team(s));
        if (t > s->tiles && adapter == p->updates[t[-1].first] && owner == paged_owner(s, t - 1, paged_team(s)))
            continue;
        for (ptrdiff_t number = 0; adapter && number < g->count; number++) {
            const struct lk_update *update = adapter + g->first + number;
            const ptrdiff_t size = lk_packed_update_size(update->rank, g->linears[number]->out, g->linears[number]->in);
            if (update->rank)
                to[ranges++] = (struct a16_later){update->codes, size * (ptrdiff_t)sizeof(int16_t), owner};
        }
    }
    return ranges;
}
#endif
