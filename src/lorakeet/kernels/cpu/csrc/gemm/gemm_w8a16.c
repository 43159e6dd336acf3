/* The product of an int8 weight with int16 activations (AVX2, AVX-512, VNNI), forward and input gradient.
 *
 * Each row of x is rounded to int16 with one scale, and the weight is widened to int16 a panel at a time. vpmaddwd or
 * vpdpwssd multiplies and adds adjacent pairs: twice as many products an instruction as in fp32, with exact int32 sums.
 * Reference: kernels/int8/reference.py.
 */
#include "w8a16.h"
#include "w8a16_epilogue.h"
#if defined(__AVX2__)

/* Number of int16 values that lk_pack_a16 writes. */
ptrdiff_t lk_packed_a16_size(ptrdiff_t n, ptrdiff_t depth)
{
    const ptrdiff_t size = depth ? w8a16_kc(depth) : 1;
    return (n + MR - 1) / MR * MR * ((depth + size - 1) / size * size);
}

/* x [n, depth] times factor [depth] (or NULL: 1) -> int16 in strips: [block][strip][pair][row of the strip][2], and one
 * scale for each row: 1 for zeros, NaN if a value is not finite. With `error_feedback` the rounding error of a value is
 * added to the one LK_FEEDBACK further on. */
void lk_pack_a16(const float *x, const float *factor, int16_t *strips, float *scale, ptrdiff_t n, ptrdiff_t depth,
                 int error_feedback)
{
    const ptrdiff_t size = w8a16_kc(depth), count = (n + MR - 1) / MR;
    const float most = a16_limit(depth);
    PARALLEL_ROWS(n, depth)
    for (ptrdiff_t s = 0; s < count; s++) {
        const ptrdiff_t rows = n - s * MR < MR ? n - s * MR : MR;
        float inverse[MR] = {0}, feedback[MR][LK_FEEDBACK] = {{0}};
        for (ptrdiff_t r = 0; r < rows; r++) {
            const float each = a16_row_scale(x + (s * MR + r) * depth, factor, depth, most);
            scale[s * MR + r] = each;
            inverse[r] = 1.0f / each;
        }
        for (ptrdiff_t from = 0; from < depth; from += size) {
            int32_t *to = (int32_t *)strips + (from * count + s * size) / 2 * MR;
            for (ptrdiff_t k = from; k < from + size; k += W8A16_K_STEP, to += W8A16_K_STEP / 2 * MR)
                for (ptrdiff_t r = 0; r < MR; r += 2) {
                    __m256i pairs[2];
                    for (ptrdiff_t two = 0; two < 2; two++) {
                        const float *row = x + (s * MR + (r + two < rows ? r + two : 0)) * depth;
                        pairs[two] = a16_round(row + k, factor ? factor + k : NULL, depth - k, inverse[r + two],
                                               error_feedback ? feedback[r + two] : NULL);
                    }
                    store_two_rows(pairs[0], pairs[1], to + r);
                }
        }
    }
}

/* Eight rows of the weight by sixteen bytes -> eight int16 pairs of each, as columns of a panel: [pair][NR][2]. */
static inline void w8a16_transpose_pairs(const int8_t *from, ptrdiff_t stride, int16_t *to)
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
        _mm256_store_si256((__m256i *)(to + r * 2 * NR), _mm256_cvtepi8_epi16(pair));
    }
}

/* weight [out, in], channels from j on, inputs from k0 on -> panel [pair][NR][2]; zeros beyond its edges. */
static void w8a16_pack_channels(const int8_t *weight, int16_t *panel, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j,
                                ptrdiff_t k0, ptrdiff_t size)
{
    for (ptrdiff_t k = 0; k < size; k += W8A16_K_STEP)
        for (ptrdiff_t c = 0; c < NR; c += 8) {
            int8_t edge[8][W8A16_K_STEP];
            const int8_t *from = weight + (j + c) * in + k0 + k;
            ptrdiff_t stride = in;
            if (j + c + 8 > out || k0 + k + W8A16_K_STEP > in) {
                const ptrdiff_t rows = out - j - c < 8 ? out - j - c : 8, left = in - k0 - k;
                memset(edge, 0, sizeof edge);
                for (ptrdiff_t r = 0; r < rows && left > 0; r++)
                    memcpy(edge[r], from + r * in, (size_t)(left < W8A16_K_STEP ? left : W8A16_K_STEP));
                from = edge[0];
                stride = W8A16_K_STEP;
            }
            for (ptrdiff_t r = 8; k % 64 == 0 && r < 16; r++) /* the next eight rows come from memory */
                __builtin_prefetch(from + r * in);
            w8a16_transpose_pairs(from, stride, panel + k * NR + 2 * c);
        }
}

/* weight [out, in], inputs from j on, channels from k0 on -> panel [pair][NR][2]; zeros beyond its edges. */
static void w8a16_pack_inputs(const int8_t *weight, int16_t *panel, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j, ptrdiff_t k0,
                              ptrdiff_t size)
{
    for (ptrdiff_t k = 0; k < size; k += 2)
        for (ptrdiff_t c = 0; c < NR; c += 16) {
            __m128i rows[2];
            for (int r = 0; r < 2; r++)
                rows[r] = load_sixteen(weight, out, in, k0 + k + r, j + c);
            __m256i *to = (__m256i *)(panel + k * NR + 2 * c);
            _mm256_store_si256(to, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(rows[0], rows[1])));
            _mm256_store_si256(to + 1, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(rows[0], rows[1])));
        }
}

/* A tile of h = a strip times a panel; the first block's sums are written, what follows is added. */
static inline void w8a16_tile(const int16_t *strip, const int16_t *panel, ptrdiff_t size, const float *row_scale,
                              const struct w8a16_columns *columns, const float *u, ptrdiff_t rank, float *h,
                              ptrdiff_t stride, ptrdiff_t rows, int first)
{
    int32_vector s[MR][2];
    for (ptrdiff_t r = 0; r < rows; r++)
        fetch_columns(h + r * stride, columns->width);
    for (int r = 0; r < MR; r++)
        s[r][0] = s[r][1] = BROADCAST(0);
    for (ptrdiff_t k = 0; k < size; k += 2, strip += 2 * MR, panel += 2 * NR) {
        const int32_vector low = LOAD(panel), high = LOAD(panel + 2 * VLEN);
        for (int r = 0; r < MR; r++) {
            int32_t pair;
            memcpy(&pair, strip + 2 * r, 4);
            const int32_vector x = BROADCAST(pair);
            DOT_PAIRS(s[r][0], x, low);
            DOT_PAIRS(s[r][1], x, high);
        }
    }
    int32_vector made[MR][2]; /* a copy: variable indices would keep `s` out of the registers */
    memcpy(made, s, sizeof s);
    for (ptrdiff_t r = 0; r < rows; r++)
        w8a16_write(made[r], row_scale[r], columns, u + r * rank, rank, h + r * stride, first);
}

/* Forward: h = (x W8^T) diag(scale) + bias + u v [n, out] for packed x [n, in], u [n, rank] and v [rank, out].
 * rank is at most LK_MAX_FUSED_RANK. With `transposed`, the gradient: h = (g W8) diag(scale) [n, in] for packed g [n, out], whose
 * factor was the weight's row scale. scale and bias may be NULL. */
void lk_gemm_w8a16(const int16_t *strips, const float *row_scale, const int8_t *weight, const float *scale,
                   const float *bias, const float *u, const float *v, ptrdiff_t rank, float *h, ptrdiff_t n,
                   ptrdiff_t out, ptrdiff_t in, int transposed)
{
    const ptrdiff_t columns = transposed ? in : out, depth = transposed ? out : in;
    const ptrdiff_t size = w8a16_kc(depth), count = (n + MR - 1) / MR, wide = W8A16_PANELS * NR;
    const ptrdiff_t sides = (columns + wide - 1) / wide, parts = row_parts(sides, n), each = (count + parts - 1) / parts;
#pragma omp parallel for schedule(dynamic) collapse(2) if (n * columns > 4096)
    for (ptrdiff_t p = 0; p < sides; p++)
        for (ptrdiff_t part = 0; part < parts; part++) {
            const ptrdiff_t first = p * wide, width = min_of(columns - first, wide);
            const ptrdiff_t last = min_of((part + 1) * each, count);
            _Alignas(64) int16_t panels[W8A16_PANELS][W8A16_KC * NR];
            struct w8a16_columns of_panel[W8A16_PANELS];
            for (ptrdiff_t j = 0; j < width; j += NR)
                w8a16_load_columns(&of_panel[j / NR], scale, bias, v, rank, first + j, columns);
            for (ptrdiff_t from = 0; from < depth; from += size) {
                for (ptrdiff_t j = 0; j < width; j += NR)
                    (transposed ? w8a16_pack_inputs : w8a16_pack_channels)(weight, panels[j / NR], out, in, first + j,
                                                                           from, size);
                for (ptrdiff_t s = part * each; s < last; s++)
                    for (ptrdiff_t j = 0; j < width; j += NR)
                        w8a16_tile(strips + (from * count + s * size) * MR, panels[j / NR], size, row_scale + s * MR,
                                   &of_panel[j / NR], u + s * MR * rank, rank, h + s * MR * columns + first + j, columns,
                                   min_of(n - s * MR, MR), from == 0);
            }
        }
}

/* Write the input gradient dx [n, in] of the outlier columns: g [n, out] times their values [outliers, out], at
 * `position`. */
void lk_outlier_dgrad(const float *g, const float *value, const float *position, float *dx, ptrdiff_t n, ptrdiff_t out,
                      ptrdiff_t in, ptrdiff_t outliers)
{
    PARALLEL_ROWS(n, out)
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t k = 0; k < outliers; k++) {
            float sum = 0;
            for (ptrdiff_t j = 0; j < out; j++)
                sum += g[i * out + j] * value[k * out + j];
            dx[i * in + (ptrdiff_t)position[k]] = sum;
        }
}
#endif
