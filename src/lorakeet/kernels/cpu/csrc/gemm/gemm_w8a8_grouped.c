/* The input gradient of an int8 layer on processors with 8-bit dot products (AVX-512 VNNI, AVX-VNNI).
 *
 * g is rounded to int8 with one scale for each LK_GROUP values of a row. Sixteen instructions sum a group in int32; the
 * sums are scaled and added in fp32. vpdpbusd multiplies unsigned by signed bytes and adds four adjacent products: so
 * packing adds 128 to the weight's bytes, and the sums start at -128 times the sum of g. Reference:
 * kernels/int8/reference.py.
 */
#include "w8a8_grouped.h"
#if defined(__AVX2__)

enum { GROUPED_HALF = MR / 2 }; /* rows of a tile */

/* Number of scales, and of starts, that lk_pack_a8_grouped writes; it writes LK_GROUP times as many bytes of x. */
ptrdiff_t lk_packed_a8_groups(ptrdiff_t n, ptrdiff_t depth)
{
    return (n + MR - 1) / MR * MR * groups_of(depth);
}

/* x [n, depth] times factor [depth] (or NULL: 1) -> int8 in strips, [strip][four values][row of the strip][4]; and the
 * scale and the start of the sums of each row and group, [strip][group][row]. With `error_feedback` the rounding error of
 * a value is added to the one LK_FEEDBACK further on. */
void lk_pack_a8_grouped(const float *x, const float *factor, int8_t *codes, float *scale, int32_t *start, ptrdiff_t n,
                        ptrdiff_t depth, int error_feedback)
{
    const ptrdiff_t count = (n + MR - 1) / MR, groups = groups_of(depth);
    PARALLEL_ROWS(n, depth)
    for (ptrdiff_t s = 0; s < count; s++) {
        float feedback[MR][LK_FEEDBACK] = {{0}};
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t at = (s * groups + g) * MR;
            int32_t *to = (int32_t *)(codes + at * LK_GROUP);
            for (ptrdiff_t r = 0; r < MR; r += 2) {
                int32_t fours[2][LK_GROUP / 4];
                for (ptrdiff_t two = 0; two < 2; two++) {
                    const ptrdiff_t row = s * MR + r + two < n ? s * MR + r + two : n - 1;
                    grouped_round(x + row * depth + g * LK_GROUP, factor ? factor + g * LK_GROUP : NULL,
                                  depth - g * LK_GROUP, fours[two], scale + at + r + two, start + at + r + two,
                                  error_feedback ? feedback[r + two] : NULL);
                }
                for (int k = 0; k < LK_GROUP / 4; k += 8)
                    store_two_rows(_mm256_loadu_si256((const __m256i *)(fours[0] + k)),
                                   _mm256_loadu_si256((const __m256i *)(fours[1] + k)), to + k * MR + r);
            }
        }
    }
}

/* weight [out, in], inputs from j on, channels from k0 on -> panel [four values][NR][4]. */
static void grouped_pack_weight(const int8_t *weight, int8_t *panel, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j,
                                ptrdiff_t k0, ptrdiff_t size)
{
    const __m128i up = _mm_set1_epi8(-128);
    for (ptrdiff_t k = 0; k < size; k += 4)
        for (ptrdiff_t c = 0; c < NR; c += 16) {
            __m128i rows[4];
            for (int r = 0; r < 4; r++)
                rows[r] = _mm_xor_si128(load_sixteen(weight, out, in, k0 + k + r, j + c), up);
            interleave_four(rows, panel + k * NR + c * 4);
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

/* dx = (g W8) diag(scale) [n, in] for g [n, out] times the weight's row scales, packed by lk_pack_a8_grouped. scale may be
 * NULL. */
void lk_gemm_w8a8_grouped_dgrad(const int8_t *codes, const float *row_scale, const int32_t *start, const int8_t *weight,
                                const float *scale, float *dx, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in)
{
    const ptrdiff_t groups = groups_of(out), strips = (n + MR - 1) / MR, panels = (in + NR - 1) / NR;
    const ptrdiff_t parts = row_parts(panels, n), each = (strips + parts - 1) / parts;
#pragma omp parallel for schedule(dynamic) collapse(2) if (n * in > 4096)
    for (ptrdiff_t p = 0; p < panels; p++)
        for (ptrdiff_t part = 0; part < parts; part++) {
            const ptrdiff_t j = p * NR, width = in - j < NR ? in - j : NR;
            const ptrdiff_t last = (part + 1) * each < strips ? (part + 1) * each : strips;
            _Alignas(64) int8_t panel[GROUPED_KC * NR];
            float ones[NR];
            for (int c = 0; c < NR; c++)
                ones[c] = scale && c < width ? scale[j + c] : 1;
            for (ptrdiff_t g = 0; g < groups; g += GROUPED_KC / LK_GROUP) {
                const ptrdiff_t taken = groups - g < GROUPED_KC / LK_GROUP ? groups - g : GROUPED_KC / LK_GROUP;
                grouped_pack_weight(weight, panel, out, in, j, g * LK_GROUP, taken * LK_GROUP);
                for (ptrdiff_t s = part * each; s < last; s++) {
                    float sums[MR][NR];
                    const ptrdiff_t at = (s * groups + g) * MR, rows = n - s * MR < MR ? n - s * MR : MR;
                    for (ptrdiff_t r = 0; r < rows; r += GROUPED_HALF)
                        grouped_half(codes + at * LK_GROUP + 4 * r, row_scale + at + r, start + at + r, panel, taken,
                                     sums + r);
                    for (ptrdiff_t r = 0; r < rows; r++)
                        grouped_write(sums[r], ones, dx + (s * MR + r) * in + j, width, g == 0);
                }
            }
        }
}
#endif
