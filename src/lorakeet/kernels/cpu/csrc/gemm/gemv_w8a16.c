/* The product of an int8 weight with few rows of int16 activations (AVX2, AVX-512, VNNI).
 *
 * It computes what gemm_w8a16.c computes, to the bit: rows are rounded alike, blocks of the depth are summed exactly in
 * int32, and the sums of the blocks are added in order. So a row's result depends neither on the other rows nor on their
 * number. The weight is read once, by all rows. Reference: kernels/int8/reference.py.
 */
#include "w8a16.h"
#if defined(__AVX2__)

enum {
    GEMV_ROWS = 4,           /* rows of the weight in a tile of several rows of x */
    GEMV_TOKENS = VLEN / 4,  /* rows of x in that tile: its sums are VLEN vectors, which fold into one */
    GEMV_CHUNK = 16,         /* rows of the weight that a thread takes at a time, at least */
    GEMV_STEP = 2 * VLEN     /* products of an instruction */
};

/* Round x [depth] times factor [depth] (or NULL: 1) to int16, each block padded with zeros, and its scale, four times. */
void a16_round_row(const float *x, const float *factor, int16_t *codes, float *scale, ptrdiff_t depth)
{
    const ptrdiff_t size = w8a16_kc(depth), padded = a16_block_codes(depth);
    const float each = a16_row_scale(x, factor, depth, a16_limit(depth)), inverse = 1.0f / each;
    for (ptrdiff_t from = 0; from < depth; from += size, codes += padded) {
        for (ptrdiff_t k = 0; k < size; k += W8A16_K_STEP)
            _mm256_storeu_si256((__m256i *)(codes + k), a16_round(x + from + k, factor ? factor + from + k : NULL,
                                                                  depth - from - k, inverse, NULL));
        if (padded > size)
            memset(codes + size, 0, (size_t)(padded - size) * sizeof(int16_t));
    }
    for (int r = 0; r < GEMV_ROWS; r++)
        scale[r] = each;
}

static inline int32_vector gemv_widen(const int8_t *weight)
{
#if VLEN == 16
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)weight));
#else
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)weight));
#endif
}

/* The sums of one block of a tile, TOKENS rows of x by ROWS of the weight; lane t * ROWS + r. Both are constants, so that
 * the sums stay in registers, and so do the few pointers: the compiler would keep one for each row in memory. As many bytes
 * as are read come into the L2 cache from `ahead` on: hardware prefetchers do not follow interleaved rows. */
#define GEMV_TILE(ROWS, TOKENS)                                                                                        \
    static inline __attribute__((always_inline)) int32_vector gemv_tile_##ROWS(                                        \
        const int16_t *codes, ptrdiff_t stride, const int8_t *weight, ptrdiff_t in, ptrdiff_t size,                    \
        const int8_t *ahead)                                                                                           \
    {                                                                                                                  \
        int32_vector s[VLEN];                                                                                          \
        const int8_t *four[ROWS / 4];                                                                                  \
        for (int i = 0; i < VLEN; i++)                                                                                 \
            s[i] = BROADCAST(0);                                                                                       \
        for (int f = 0; f < ROWS / 4; f++)                                                                             \
            four[f] = weight + 4 * f * in;                                                                             \
        for (ptrdiff_t k = 0; k < size; k += GEMV_STEP) {                                                              \
            int32_vector x[TOKENS];                                                                                    \
            for (int t = 0; t < TOKENS; t++)                                                                           \
                x[t] = LOAD(codes + t * stride + k);                                                                   \
            for (int f = 0; f < ROWS / 4; f++)                                                                         \
                __asm__("" : "+r"(four[f]));                                                                           \
            for (int r = 0; r < ROWS; r++) {                                                                           \
                const int32_vector w = gemv_widen(four[r / 4] + r % 4 * in);                                           \
                if (r * GEMV_STEP % 64 == 0)                                                                           \
                    __builtin_prefetch(ahead + ROWS * k + r * GEMV_STEP, 0, 2);                                        \
                for (int t = 0; t < TOKENS; t++)                                                                       \
                    DOT_PAIRS(s[t * ROWS + r], x[t], w);                                                               \
            }                                                                                                          \
            for (int f = 0; f < ROWS / 4; f++)                                                                         \
                four[f] += GEMV_STEP;                                                                                  \
        }                                                                                                              \
        return fold_int32(s);                                                                                          \
    }
GEMV_TILE(4, GEMV_TOKENS)
#if VLEN == 16
GEMV_TILE(16, 1)
#define GEMV_TILE_ONE gemv_tile_16
#else
GEMV_TILE(8, 1)
#define GEMV_TILE_ONE gemv_tile_8
#endif

static inline floats gemv_four_times(const float *four)
{
#if VLEN == 16
    return (floats)_mm512_broadcast_f32x4(_mm_loadu_ps(four));
#else
    return (floats)_mm256_broadcast_ps((const __m128 *)four);
#endif
}

static inline floats gemv_all(float value)
{
    return (floats){0} + value;
}

/* What a thread needs after the product, in windows of the bytes that a tile reads. */
struct gemv_later {
    const struct a16_later *range, *end;
    ptrdiff_t at;           /* bytes of the range that were brought */
    ptrdiff_t every, tiles; /* tiles to each window; tiles since the last one */
    int thread;
};

/* Spread what this thread needs over `bytes` of the tiles that it will compute. */
static struct gemv_later gemv_begin(const struct a16_later *later, ptrdiff_t ranges, ptrdiff_t bytes)
{
    struct gemv_later to = {later, later + ranges, 0, 1, 0, own_thread()};
    ptrdiff_t needed = 1;
    for (ptrdiff_t r = 0; r < ranges; r++)
        needed += later[r].thread == to.thread ? later[r].bytes : 0;
    to.every = bytes > needed ? bytes / needed : 1;
    return to;
}

/* The next `bytes` that this thread needs, if it is their turn, or else `other`. */
static const int8_t *gemv_next(struct gemv_later *later, ptrdiff_t bytes, const int8_t *other)
{
    while (later->range < later->end && (later->range->thread != later->thread || later->at >= later->range->bytes))
        later->range++, later->at = 0;
    if (later->range == later->end || ++later->tiles < later->every)
        return other;
    const int8_t *from = (const int8_t *)later->range->from + later->at;
    later->at += bytes;
    later->tiles = 0;
    return from;
}

/* GEMV_CHUNK rows of the weight from j on, by all rows of x; `ahead` is the chunk after it. The first rows of x bring that
 * into the cache, and the next ones as many bytes of what is needed after the product. A tile's rows of the weight stay in
 * the L1 cache for all rows of x. */
static void gemv_chunk(const struct a16_product *p, ptrdiff_t j, ptrdiff_t n, ptrdiff_t in, const int8_t *ahead,
                       struct gemv_later *later)
{
    const ptrdiff_t size = w8a16_kc(in), padded = a16_block_codes(in), stride = a16_row_codes(in);
    const ptrdiff_t together = n / GEMV_TOKENS * GEMV_TOKENS;
    for (ptrdiff_t c = j; together && c < j + GEMV_CHUNK; c += GEMV_ROWS) {
        const floats row_scale = gemv_four_times(p->row_scale + c);
        const floats bias = p->bias ? gemv_four_times(p->bias + c) : (floats){0};
        const int8_t *next = ahead + (c - j) * in;
        for (ptrdiff_t i = 0; i < together; i += GEMV_TOKENS) {
            const int16_t *codes = p->codes + i * stride;
            const int8_t *bring = i ? gemv_next(later, GEMV_ROWS * in, next) : next;
            const floats x_scale = load(p->scale + i * GEMV_ROWS);
            floats sum = bias;
            float made[VLEN];
            for (ptrdiff_t from = 0; from < in; from += size, codes += padded)
                sum = a16_add(sum,
                              gemv_tile_4(codes, stride, p->weight + c * in + from, in, padded,
                                          bring + GEMV_ROWS * from),
                              x_scale, row_scale);
            store(made, sum);
            for (int t = 0; t < GEMV_TOKENS; t++)
                memcpy(p->h + (i + t) * p->out + c, made + t * GEMV_ROWS, GEMV_ROWS * sizeof(float));
        }
    }
    for (ptrdiff_t i = together; i < n; i++)
        for (ptrdiff_t c = j; c < j + GEMV_CHUNK; c += VLEN) {
            const floats row_scale = load(p->row_scale + c), x_scale = gemv_all(p->scale[i * GEMV_ROWS]);
            floats sum = p->bias ? load(p->bias + c) : (floats){0};
            const int16_t *codes = p->codes + i * stride;
            const int8_t *next = ahead + (c - j) * in, *bring = i ? gemv_next(later, VLEN * in, next) : next;
            for (ptrdiff_t from = 0; from < in; from += size, codes += padded)
                sum = a16_add(sum,
                              GEMV_TILE_ONE(codes, stride, p->weight + c * in + from, in, padded,
                                            bring + VLEN * from),
                              x_scale, row_scale);
            store(p->h + i * p->out + c, sum);
        }
}

/* The rows of the weight from j on that are no whole chunk, or behind which a chunk would read. */
static void gemv_edge(const struct a16_product *p, ptrdiff_t j, ptrdiff_t end, ptrdiff_t n, ptrdiff_t in)
{
    const ptrdiff_t size = w8a16_kc(in), padded = a16_block_codes(in), stride = a16_row_codes(in);
    for (; j < end; j++)
        for (ptrdiff_t i = 0; i < n; i++) {
            const int16_t *codes = p->codes + i * stride;
            const int8_t *weight = p->weight + j * in;
            floats sum = gemv_all(p->bias ? p->bias[j] : 0);
            for (ptrdiff_t from = 0; from < in; from += size, codes += padded) {
                int32_t made = 0;
                for (ptrdiff_t k = 0; k < min_of(in - from, size); k++)
                    made += codes[k] * weight[from + k];
                sum = a16_add(sum, BROADCAST(made), gemv_all(p->scale[i * GEMV_ROWS]), gemv_all(p->row_scale[j]));
            }
            p->h[i * p->out + j] = sum[0];
        }
}

/* The product that a chunk belongs to, counted over all of them; `*at` becomes its first row of that weight. */
static const struct a16_product *gemv_find(const struct a16_product *p, ptrdiff_t *at)
{
    for (*at *= GEMV_CHUNK; *at >= p->out; p++)
        *at -= (p->out + GEMV_CHUNK - 1) / GEMV_CHUNK * GEMV_CHUNK;
    return p;
}

/* Products of the same n rows, rounded for each, with the weights of several layers. What each thread needs `later`, a
 * number of ranges, comes into its cache meanwhile. */
void a16_multiply(const struct a16_product *products, ptrdiff_t count, ptrdiff_t n, ptrdiff_t in,
                  const struct a16_later *later, ptrdiff_t ranges)
{
    const ptrdiff_t size = w8a16_kc(in), past = (in + size - 1) / size * size - size + a16_block_codes(in) - in;
    ptrdiff_t chunks = 0;
    for (ptrdiff_t p = 0; p < count; p++)
        chunks += (products[p].out + GEMV_CHUNK - 1) / GEMV_CHUNK;
#pragma omp parallel if (chunks * GEMV_CHUNK * in > 32768)
    {
        const ptrdiff_t again = (n - 1) / GEMV_TOKENS; /* times that a tile's weights are read from the L1 cache */
        struct gemv_later own = gemv_begin(later, ranges, again * chunks * GEMV_CHUNK * in / most_threads());
#pragma omp for schedule(guided, 2)
        for (ptrdiff_t at = 0; at < chunks; at++) {
            ptrdiff_t j = at, next = min_of(at + 1, chunks - 1);
            const struct a16_product *p = gemv_find(products, &j), *after = gemv_find(products, &next);
            const ptrdiff_t end = min_of(j + GEMV_CHUNK, p->out);
            if (end - j == GEMV_CHUNK && end * in + (past > 0 ? past : 0) <= p->out * in)
                gemv_chunk(p, j, n, in, after->weight + next * in, &own);
            else
                gemv_edge(p, j, end, n, in);
        }
    }
}

/* Number of bytes of the workspace of lk_gemv_w8a16: codes and scales of n rows. */
ptrdiff_t lk_packed_a16_rows(ptrdiff_t n, ptrdiff_t depth)
{
    return n * (a16_row_codes(depth) * (ptrdiff_t)sizeof(int16_t) + GEMV_ROWS * (ptrdiff_t)sizeof(float));
}

/* h = (x diag(column_scale) W8^T) diag(row_scale) + bias for x [n, in] and W8 [out, in]. x is rounded to int16 by rows;
 * column_scale and bias may be NULL. */
void lk_gemv_w8a16(const float *x, const int8_t *weight, const float *row_scale, const float *column_scale,
                   const float *bias, float *h, void *workspace, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in)
{
    const ptrdiff_t stride = a16_row_codes(in);
    float *scale = workspace;
    int16_t *codes = (int16_t *)(scale + n * GEMV_ROWS);
    PARALLEL_ROWS(n, in)
    for (ptrdiff_t i = 0; i < n; i++)
        a16_round_row(x + i * in, column_scale, codes + i * stride, scale + i * GEMV_ROWS, in);
    const struct a16_product product = {codes, scale, weight, row_scale, bias, h, out};
    a16_multiply(&product, 1, n, in, NULL, 0);
}
#endif
