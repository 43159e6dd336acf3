/* The 8-bit product of many tokens, x in 16 bits (AVX2, AVX-512, VNNI).
 *
 * x is rounded to 16 bits with one scale for each row, the weight's bytes are widened to 16 bits a panel at a time, and
 * vpmaddwd or vpdpwssd multiplies and adds neighbours in pairs: twice as many products an instruction as fp32 has, sums exact
 * in int32. Its slow truth is in int8.py.
 */
#include "gemm_tiles.h"
#if defined(__AVX2__)

enum {
    DEPTH = 640,  /* at most so many products are summed in int32, and are widened at once: a panel stays in the first cache */
    SIDE = 2,     /* panels that a strip is multiplied with while it is in the first cache */
    STEP = 16,    /* depths are filled up with zeros to a multiple of this */
    LOW = 64      /* at most this rank has a low-rank product that is added while a tile is written */
};

/* How the depth is cut: blocks of nearly one size, each a multiple of STEP. */
static ptrdiff_t block_size(ptrdiff_t depth)
{
    const ptrdiff_t blocks = (depth + DEPTH - 1) / DEPTH, size = (depth + blocks - 1) / blocks;
    return (size + STEP - 1) / STEP * STEP;
}

/* What values are rounded to, but for one that was carried on: a block's sums, with weights of 127, stay below 2^31. */
static float limit(ptrdiff_t depth)
{
    const ptrdiff_t most = INT32_MAX / (127 * block_size(depth));
    return (float)((most < INT16_MAX ? most : INT16_MAX) - 1);
}

/* How many int16 round_strips writes. */
ptrdiff_t strips_size(ptrdiff_t n, ptrdiff_t depth)
{
    const ptrdiff_t size = depth ? block_size(depth) : 1;
    return (n + STRIP - 1) / STRIP * STRIP * ((depth + size - 1) / size * size);
}

/* STEP values of a row times their factors and `times`, as int16; those from `left` on zeros. What was lost before, at `carry`,
 * is added, and what is lost now left there; nothing if it is NULL. */
static inline __m256i rounded(const float *row, const float *factor, ptrdiff_t left, float times, float *carry)
{
#if WIDTH == 16
    __m512 v = _mm512_mul_ps(some(row, factor, left), _mm512_set1_ps(times));
    if (carry)
        v = _mm512_add_ps(v, _mm512_loadu_ps(carry));
    const __m512i code = _mm512_cvtps_epi32(v);
    if (carry)
        _mm512_storeu_ps(carry, _mm512_sub_ps(v, _mm512_cvtepi32_ps(code)));
    return _mm512_cvtsepi32_epi16(code);
#else
    __m256i half[2];
    for (int h = 0; h < 2; h++) {
        __m256 v = some(row + 8 * h, factor ? factor + 8 * h : NULL, left - 8 * h);
        v = _mm256_mul_ps(v, _mm256_set1_ps(times));
        if (carry)
            v = _mm256_add_ps(v, _mm256_loadu_ps(carry + 8 * h));
        half[h] = _mm256_cvtps_epi32(v);
        if (carry)
            _mm256_storeu_ps(carry + 8 * h, _mm256_sub_ps(v, _mm256_cvtepi32_ps(half[h])));
    }
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(half[0], half[1]), 0xD8);
#endif
}

/* The scale of a row: its largest absolute value over `most`; 1 for zeros, NaN where a value is not finite. Magnitudes of fp32
 * order as their bits do, what is not finite above all others. */
static float row_scale_of(const float *row, const float *factor, ptrdiff_t depth, float most)
{
    enum { CHAINS = 4 }; /* so that no maximum waits for the one before it */
    int32_t each[CHAINS * WIDTH], bits = 0;
    float largest;
    sums_of m[CHAINS];
    for (int c = 0; c < CHAINS; c++)
        m[c] = EVERY(0);
    for (ptrdiff_t k = 0; k < depth; k += CHAINS * WIDTH)
        for (int c = 0; c < CHAINS; c++) {
            const ptrdiff_t at = k + c * WIDTH;
            m[c] = LARGER(m[c], MAGNITUDE(some(row + at, factor ? factor + at : NULL, depth - at)));
        }
    memcpy(each, m, sizeof each);
    for (int e = 0; e < CHAINS * WIDTH; e++)
        bits = each[e] > bits ? each[e] : bits;
    memcpy(&largest, &bits, sizeof largest);
    return !isfinite(largest) ? NAN : largest >= most * FLT_MIN ? largest / most : 1.0f;
}

/* x [n, depth] times factor [depth] (or NULL: 1) -> int16 in strips: [block][strip][pair][row of the strip][2], and one scale
 * for each row. A row of zeros has the scale 1, one with a value that is not finite has the scale NaN. With `even` what rounding
 * takes from a value is given to a later one of its row. */
void round_strips(const float *x, const float *factor, int16_t *strips, float *scale, ptrdiff_t n, ptrdiff_t depth, int even)
{
    const ptrdiff_t size = block_size(depth), count = (n + STRIP - 1) / STRIP;
    const float most = limit(depth);
    OF_ROWS(n, depth)
    for (ptrdiff_t s = 0; s < count; s++) {
        const ptrdiff_t rows = n - s * STRIP < STRIP ? n - s * STRIP : STRIP;
        float inverse[STRIP] = {0}, carry[STRIP][LANES] = {{0}};
        for (ptrdiff_t r = 0; r < rows; r++) {
            const float each = row_scale_of(x + (s * STRIP + r) * depth, factor, depth, most);
            scale[s * STRIP + r] = each;
            inverse[r] = 1.0f / each;
        }
        for (ptrdiff_t from = 0; from < depth; from += size) {
            int32_t *to = (int32_t *)strips + (from * count + s * size) / 2 * STRIP;
            for (ptrdiff_t k = from; k < from + size; k += STEP, to += STEP / 2 * STRIP)
                for (ptrdiff_t r = 0; r < STRIP; r += 2) {
                    __m256i pairs[2];
                    for (ptrdiff_t two = 0; two < 2; two++) {
                        const float *row = x + (s * STRIP + (r + two < rows ? r + two : 0)) * depth;
                        pairs[two] = rounded(row + k, factor ? factor + k : NULL, depth - k, inverse[r + two],
                                             even ? carry[r + two] : NULL);
                    }
                    put_two(pairs[0], pairs[1], to + r);
                }
        }
    }
}

/* Eight rows of the weight by sixteen bytes -> their columns of eight pairs of a panel: [pair][PANEL][2]. */
static inline void transpose_pairs(const int8_t *from, ptrdiff_t stride, int16_t *to)
{
    __m128i rows[8], two[8], four[8];
    for (int r = 0; r < 8; r++)
        rows[r] = _mm_loadu_si128((const __m128i *)(from + r * stride));
    for (int r = 0; r < 4; r++) {
        two[r] = _mm_unpacklo_epi16(rows[2 * r], rows[2 * r + 1]);
        two[4 + r] = _mm_unpackhi_epi16(rows[2 * r], rows[2 * r + 1]);
    }
    for (int r = 0; r < 4; r++) {
        four[2 * r] = _mm_unpacklo_epi32(two[2 * r], two[2 * r + 1]);
        four[2 * r + 1] = _mm_unpackhi_epi32(two[2 * r], two[2 * r + 1]);
    }
    for (int r = 0; r < 8; r++) {
        const int a = r / 4 * 4 + r % 4 / 2;
        const __m128i pair = r % 2 ? _mm_unpackhi_epi64(four[a], four[a + 2]) : _mm_unpacklo_epi64(four[a], four[a + 2]);
        _mm256_store_si256((__m256i *)(to + r * 2 * PANEL), _mm256_cvtepi8_epi16(pair));
    }
}

/* weight [out, in], channels from j on, inputs from k0 on -> panel [pair][PANEL][2]; zeros beyond its edges. */
static void panel_of_channels(const int8_t *weight, int16_t *panel, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j, ptrdiff_t k0,
                              ptrdiff_t size)
{
    for (ptrdiff_t k = 0; k < size; k += STEP)
        for (ptrdiff_t c = 0; c < PANEL; c += 8) {
            int8_t edge[8][STEP];
            const int8_t *from = weight + (j + c) * in + k0 + k;
            ptrdiff_t stride = in;
            if (j + c + 8 > out || k0 + k + STEP > in) {
                const ptrdiff_t rows = out - j - c < 8 ? out - j - c : 8, left = in - k0 - k;
                memset(edge, 0, sizeof edge);
                for (ptrdiff_t r = 0; r < rows && left > 0; r++)
                    memcpy(edge[r], from + r * in, (size_t)(left < STEP ? left : STEP));
                from = edge[0];
                stride = STEP;
            }
            transpose_pairs(from, stride, panel + k * PANEL + 2 * c);
        }
}

/* weight [out, in], inputs from j on, channels from k0 on -> panel [pair][PANEL][2]; zeros beyond its edges. */
static void panel_of_inputs(const int8_t *weight, int16_t *panel, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j, ptrdiff_t k0,
                            ptrdiff_t size)
{
    for (ptrdiff_t k = 0; k < size; k += 2)
        for (ptrdiff_t c = 0; c < PANEL; c += 16) {
            __m128i rows[2];
            for (int r = 0; r < 2; r++)
                rows[r] = sixteen_of(weight, out, in, k0 + k + r, j + c);
            __m256i *to = (__m256i *)(panel + k * PANEL + 2 * c);
            _mm256_store_si256(to, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(rows[0], rows[1])));
            _mm256_store_si256(to + 1, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(rows[0], rows[1])));
        }
}

/* A tile of h: the first block's sums are written, with the bias and u v of u [rows, rank] and v [rank][SIDE * PANEL]; what
 * follows is added. */
static inline void tile(const int16_t *strip, const int16_t *panel, ptrdiff_t size, const float *row_scale,
                        const float *scale, const float *bias, const float *u, const float *v, ptrdiff_t rank, float *h,
                        ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, int first)
{
    sums_of s[STRIP][2];
    for (int r = 0; r < STRIP; r++)
        s[r][0] = s[r][1] = EVERY(0);
    for (ptrdiff_t k = 0; k < size; k += 2, strip += 2 * STRIP, panel += 2 * PANEL) {
        const sums_of low = LOAD(panel), high = LOAD(panel + 2 * WIDTH);
        for (int r = 0; r < STRIP; r++) {
            int32_t pair;
            memcpy(&pair, strip + 2 * r, 4);
            const sums_of x = EVERY(pair);
            PLUS_PAIRS(s[r][0], x, low);
            PLUS_PAIRS(s[r][1], x, high);
        }
    }
    sums_of made[STRIP][2]; /* those above stay in registers if they are not asked for by number */
    memcpy(made, s, sizeof s);
    for (ptrdiff_t r = 0; r < rows; r++) {
        float edge[PANEL], *to = columns == PANEL ? h + r * stride : edge;
        if (columns < PANEL && !first)
            memcpy(edge, h + r * stride, (size_t)columns * sizeof(float));
        for (int half = 0; half < 2; half++) {
            floats sum = first ? load(bias + WIDTH * half) : load(to + WIDTH * half);
            for (ptrdiff_t k = 0; first && k < rank; k++)
                sum += u[r * rank + k] * load(v + k * SIDE * PANEL + WIDTH * half);
            store(to + WIDTH * half, sum + IN_FP32(made[r][half]) * row_scale[r] * load(scale + WIDTH * half));
        }
        if (columns < PANEL)
            memcpy(h + r * stride, edge, (size_t)columns * sizeof(float));
    }
}

ptrdiff_t most_low(void)
{
    return LOW;
}

/* h = (x W8^T) diag(scale) + bias + u v [n, out] of strips of x [n, in], u [n, rank] and v [rank, out], rank <= LOW; with
 * transposed: h = (g W8) [n, in] of strips of g [n, out], whose factor had the weight's scales. scale and bias may be NULL. */
void pair_product(const int16_t *strips, const float *row_scale, const int8_t *weight, const float *scale, const float *bias,
                  const float *u, const float *v, ptrdiff_t rank, float *h, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in,
                  int transposed)
{
    const ptrdiff_t columns = transposed ? in : out, depth = transposed ? out : in;
    const ptrdiff_t size = block_size(depth), count = (n + STRIP - 1) / STRIP, wide = SIDE * PANEL;
    const ptrdiff_t sides = (columns + wide - 1) / wide, parts = row_parts(sides, n), each = (count + parts - 1) / parts;
#pragma omp parallel for schedule(dynamic) collapse(2) if (n * columns > 4096)
    for (ptrdiff_t p = 0; p < sides; p++)
        for (ptrdiff_t part = 0; part < parts; part++) {
            const ptrdiff_t first = p * wide, width = least(columns - first, wide), last = least((part + 1) * each, count);
            _Alignas(64) int16_t panels[SIDE][DEPTH * PANEL];
            float ones[SIDE * PANEL], zeros[SIDE * PANEL] = {0}, low[LOW][SIDE * PANEL];
            for (int c = 0; c < wide; c++)
                ones[c] = 1;
            if (scale)
                memcpy(ones, scale + first, (size_t)width * sizeof(float));
            if (bias)
                memcpy(zeros, bias + first, (size_t)width * sizeof(float));
            for (ptrdiff_t k = 0; k < rank; k++) {
                memcpy(low[k], v + k * columns + first, (size_t)width * sizeof(float));
                memset(low[k] + width, 0, (size_t)(wide - width) * sizeof(float));
            }
            for (ptrdiff_t from = 0; from < depth; from += size) {
                for (ptrdiff_t j = 0; j < width; j += PANEL)
                    (transposed ? panel_of_inputs : panel_of_channels)(weight, panels[j / PANEL], out, in, first + j, from, size);
                for (ptrdiff_t s = part * each; s < last; s++)
                    for (ptrdiff_t j = 0; j < width; j += PANEL)
                        tile(strips + (from * count + s * size) * STRIP, panels[j / PANEL], size, row_scale + s * STRIP, ones + j,
                             zeros + j, u + s * STRIP * rank, low[0] + j, rank, h + s * STRIP * columns + first + j, columns,
                             least(n - s * STRIP, STRIP), least(width - j, PANEL), from == 0);
            }
        }
}

/* dx [n, in] at `kept` places: g [n, out] times the columns [kept, out] that are kept there. */
void kept_gradient(const float *g, const float *column, const float *place, float *dx, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in,
                   ptrdiff_t kept)
{
    OF_ROWS(n, out)
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t k = 0; k < kept; k++) {
            float sum = 0;
            for (ptrdiff_t j = 0; j < out; j++)
                sum += g[i * out + j] * column[k * out + j];
            dx[i * in + (ptrdiff_t)place[k]] = sum;
        }
}
#endif
