/* The input gradient of an int8 layer on processors with 8-bit dot products (AVX-512 VNNI, AVX-VNNI).
 *
 * g is rounded to int8 with one scale for each LK_GROUP values of a row. Sixteen instructions sum a group in int32; the
 * sums are scaled and added in fp32. vpdpbusd multiplies unsigned by signed bytes and adds four adjacent products: so
 * packing adds 128 to the weight's bytes, and the sums start at -128 times the sum of g. Reference:
 * kernels/int8/reference.py.
 */
#include "w8a8_grouped.h"
#if defined(__AVX2__)

enum {
    GROUPED_HALF = MR / 2, /* rows of a tile */
    GROUPED_PANELS = 2     /* panels of a side: they share the cache lines of the weight, and a strip in the L1 cache */
};

/* Number of scales, and of starts, that lk_pack_a8_grouped writes; it writes LK_GROUP times as many bytes of x. */
ptrdiff_t lk_packed_a8_groups(ptrdiff_t n, ptrdiff_t depth)
{
    return (n + MR - 1) / MR * MR * groups_of(depth);
}

/* A strip of lk_pack_a8_grouped; `error_feedback` is a constant. */
static inline __attribute__((always_inline)) void grouped_pack_strip(const float *x, const float *factor, int8_t *codes,
                                                                     float *scale, int32_t *start, ptrdiff_t rows,
                                                                     ptrdiff_t depth, const int error_feedback)
{
    float feedback[MR][LK_FEEDBACK] = {{0}};
    for (ptrdiff_t k = 0; k < depth; k += LK_GROUP, codes += MR * LK_GROUP, scale += MR, start += MR)
        for (ptrdiff_t r = 0; r < MR; r += 2) {
            int32_t fours[2][LK_GROUP / 4];
            for (ptrdiff_t two = 0; two < 2; two++) {
                const float *row = x + min_of(r + two, rows - 1) * depth + k;
                for (ptrdiff_t ahead = 0; ahead < LK_GROUP; ahead += 16) /* of the next group but one */
                    __builtin_prefetch(row + 2 * LK_GROUP + ahead);
                grouped_round(row, factor ? factor + k : NULL, depth - k, fours[two], scale + r + two, start + r + two,
                              error_feedback ? feedback[r + two] : NULL);
            }
            for (int q = 0; q < LK_GROUP / 4; q += 8)
                store_two_rows(_mm256_loadu_si256((const __m256i *)(fours[0] + q)),
                               _mm256_loadu_si256((const __m256i *)(fours[1] + q)), (int32_t *)codes + q * MR + r);
        }
}

/* x [n, depth] times factor [depth] (or NULL: 1) -> int8 in strips, [strip][four values][row of the strip][4]; and the
 * scale and the start of the sums of each row and group, [strip][group][row]. With `error_feedback` the rounding error of
 * a value is added to the one LK_FEEDBACK further on. */
void lk_pack_a8_grouped(const float *x, const float *factor, int8_t *codes, float *scale, int32_t *start, ptrdiff_t n,
                        ptrdiff_t depth, int error_feedback)
{
    const ptrdiff_t groups = groups_of(depth);
    PARALLEL_ROWS(n, depth)
    for (ptrdiff_t i = 0; i < n; i += MR) {
        const ptrdiff_t at = i * groups, rows = min_of(n - i, MR);
        if (error_feedback)
            grouped_pack_strip(x + i * depth, factor, codes + at * LK_GROUP, scale + at, start + at, rows, depth, 1);
        else
            grouped_pack_strip(x + i * depth, factor, codes + at * LK_GROUP, scale + at, start + at, rows, depth, 0);
    }
}

/* Four rows of NR bytes plus 128, `in` apart, -> [byte of a row][row]. */
static inline void grouped_interleave(const int8_t *from, ptrdiff_t in, int8_t *to)
{
#if VLEN == 16
    __m256i rows[4], four[4];
    for (int r = 0; r < 4; r++)
        rows[r] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(from + r * in)), _mm256_set1_epi8(-128));
    const __m256i a = _mm256_unpacklo_epi8(rows[0], rows[1]), b = _mm256_unpackhi_epi8(rows[0], rows[1]);
    const __m256i d = _mm256_unpacklo_epi8(rows[2], rows[3]), e = _mm256_unpackhi_epi8(rows[2], rows[3]);
    four[0] = _mm256_unpacklo_epi16(a, d);
    four[1] = _mm256_unpackhi_epi16(a, d);
    four[2] = _mm256_unpacklo_epi16(b, e);
    four[3] = _mm256_unpackhi_epi16(b, e);
    for (int i = 0; i < 2; i++) { /* the lower sixteen columns are in the lower lanes */
        _mm256_storeu_si256((__m256i *)to + i, _mm256_permute2x128_si256(four[2 * i], four[2 * i + 1], 0x20));
        _mm256_storeu_si256((__m256i *)to + 2 + i, _mm256_permute2x128_si256(four[2 * i], four[2 * i + 1], 0x31));
    }
#else
    __m128i rows[4];
    for (int r = 0; r < 4; r++)
        rows[r] = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(from + r * in)), _mm_set1_epi8(-128));
    interleave_four(rows, to);
#endif
}

/* weight [out, in], inputs from j on, channels from k0 on -> panel [four values][NR][4]; beyond its edges as if zeros. */
static void grouped_pack_weight(const int8_t *weight, int8_t *panel, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j,
                                ptrdiff_t k0, ptrdiff_t size)
{
    const int8_t *from = weight + k0 * in + j;
    ptrdiff_t k = 0;
    if (j + NR <= in)
        for (; k + 4 <= min_of(size, out - k0); k += 4)
            grouped_interleave(from + k * in, in, panel + k * NR);
    for (; k < size; k += 4) {
        int8_t edge[4][NR] = {{0}};
        for (ptrdiff_t r = 0; r < min_of(4, out - k0 - k); r++)
            memcpy(edge[r], from + (k + r) * in, (size_t)min_of(in - j, NR));
        grouped_interleave(edge[0], NR, panel + k * NR);
    }
}

/* sums [HALF][NR] = half a strip times a panel, over `groups` groups. Sums of a group and of all stay in registers. */
static inline __attribute__((always_inline)) void grouped_half(const int8_t *codes, const float *scale, const int32_t *start,
                                                               const int8_t *panel, ptrdiff_t groups,
                                                               float sums[GROUPED_HALF][NR])
{
    floats all[GROUPED_HALF][2];
    for (int r = 0; r < GROUPED_HALF; r++)
        all[r][0] = all[r][1] = (floats){0};
    for (ptrdiff_t g = 0; g < groups; g++, scale += MR, start += MR) {
        int32_vector s[GROUPED_HALF][2];
        for (int r = 0; r < GROUPED_HALF; r++)
            s[r][0] = s[r][1] = BROADCAST(start[r]);
        for (int k = 0; k < LK_GROUP / 4; k++, codes += 4 * MR, panel += 4 * NR) {
            const int32_vector low = LOAD(panel), high = LOAD(panel + 4 * VLEN);
            for (int r = 0; r < GROUPED_HALF; r++) {
                int32_t four;
                memcpy(&four, codes + 4 * r, 4);
                const int32_vector x = BROADCAST(four);
                DOT_FOURS(s[r][0], low, x);
                DOT_FOURS(s[r][1], high, x);
            }
        }
        for (int r = 0; r < GROUPED_HALF; r++) {
            all[r][0] = grouped_add(all[r][0], s[r][0], scale[r]);
            all[r][1] = grouped_add(all[r][1], s[r][1], scale[r]);
        }
    }
    for (int r = 0; r < GROUPED_HALF; r++) {
        store(sums[r], all[r][0]);
        store(sums[r] + VLEN, all[r][1]);
    }
}

/* Some columns of the weight, packed. */
struct grouped_side {
    int8_t panels[GROUPED_PANELS][GROUPED_KC * NR];
    float scale[GROUPED_PANELS * NR]; /* of the columns */
    ptrdiff_t begin, width;           /* columns of dx */
};

/* A strip times the panels of a side, over `groups` groups. */
static inline void grouped_strip(const struct grouped_side *side, const int8_t *codes, const float *row_scale,
                                 const int32_t *start, ptrdiff_t groups, float *dx, ptrdiff_t in, ptrdiff_t rows, int first)
{
    for (ptrdiff_t j = 0; j < side->width; j += NR) {
        float sums[MR][NR];
        for (ptrdiff_t r = 0; r < rows; r += GROUPED_HALF)
            grouped_half(codes + 4 * r, row_scale + r, start + r, side->panels[j / NR], groups, sums + r);
        for (ptrdiff_t r = 0; r < rows; r++)
            grouped_write(sums[r], side->scale + j, dx + r * in + j, min_of(side->width - j, NR), first);
    }
}

/* dx = (g W8) diag(scale) [n, in] for g [n, out] times the weight's row scales, packed by lk_pack_a8_grouped. scale may be
 * NULL. */
void lk_gemm_w8a8_grouped_dgrad(const int8_t *codes, const float *row_scale, const int32_t *start, const int8_t *weight,
                                const float *scale, float *dx, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in)
{
    const ptrdiff_t groups = groups_of(out), strips = (n + MR - 1) / MR, wide = GROUPED_PANELS * NR;
    const ptrdiff_t sides = (in + wide - 1) / wide, parts = row_parts(sides, n), each = (strips + parts - 1) / parts;
#pragma omp parallel for schedule(dynamic) collapse(2) if (n * in > 4096)
    for (ptrdiff_t p = 0; p < sides; p++)
        for (ptrdiff_t part = 0; part < parts; part++) {
            _Alignas(64) struct grouped_side side;
            side.begin = p * wide;
            side.width = min_of(in - side.begin, wide);
            for (ptrdiff_t c = 0; c < wide; c++)
                side.scale[c] = scale && c < side.width ? scale[side.begin + c] : 1;
            for (ptrdiff_t g = 0; g < groups; g += GROUPED_KC / LK_GROUP) {
                const ptrdiff_t taken = min_of(groups - g, GROUPED_KC / LK_GROUP);
                for (ptrdiff_t j = 0; j < side.width; j += NR)
                    grouped_pack_weight(weight, side.panels[j / NR], out, in, side.begin + j, g * LK_GROUP, taken * LK_GROUP);
                for (ptrdiff_t s = part * each; s < min_of((part + 1) * each, strips); s++) {
                    const ptrdiff_t at = (s * groups + g) * MR;
                    grouped_strip(&side, codes + at * LK_GROUP, row_scale + at, start + at, taken,
                                  dx + s * MR * in + side.begin, in, min_of(n - s * MR, MR), g == 0);
                }
            }
        }
}
#endif
