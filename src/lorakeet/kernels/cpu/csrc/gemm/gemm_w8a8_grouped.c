/* The input gradient of an int8 layer on processors with 8-bit dot products (AVX-512 VNNI, AVX-VNNI).
 *
 * g is rounded to int8 with one scale for each LK_GROUP values of a row. Sixteen instructions sum a group in int32; the
 * sums are scaled and added in fp32. vpdpbusd multiplies unsigned by signed bytes and adds four adjacent products: so
 * packing adds 128 to the weight's bytes, and the sums start at -128 times the sum of g. Reference:
 * kernels/int8/reference.py.
 */
#include "gemm_tiles.h"
#if defined(__AVX2__)

enum { GROUPED_KC = 2048 }; /* depth of a block: a packed panel stays in the L2 cache */
_Static_assert(GROUPED_KC % LK_GROUP == 0, "a block holds whole groups");
_Static_assert(LK_GROUP % LK_FEEDBACK == 0 && LK_FEEDBACK == 16, "grouped_round carries the errors of sixteen values on");

static ptrdiff_t groups_of(ptrdiff_t depth)
{
    return (depth + LK_GROUP - 1) / LK_GROUP;
}

/* Number of scales, and of starts, that lk_pack_a8_grouped writes; it writes LK_GROUP times as many bytes of x. */
ptrdiff_t lk_packed_a8_groups(ptrdiff_t n, ptrdiff_t depth)
{
    return (n + MR - 1) / MR * MR * groups_of(depth);
}

/* The scale of a group whose largest magnitude has these bits, and its inverse: 1 and 0 for zeros, NaN and 0 if a value is
 * not finite. The bits of fp32 magnitudes, read as integers, order as the values do, with infinity and NaN on top. */
static inline float grouped_scale(int32_t bits, float *inverse)
{
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    *inverse = 0.0f;
    if (bits >= 0x7f800000)
        return NAN;
    if (largest < 127.0f * FLT_MIN)
        return 1.0f;
    *inverse = 127.0f / largest;
    return largest / 127.0f;
}

/* Round LK_GROUP values of a row, times their factors, to int8. `left` of them are in memory, the others are zeros. Writes
 * their scale and the start of their sums too. Unless `feedback` is NULL, the rounding error of a value is added to the one
 * LK_FEEDBACK further on: the first LK_FEEDBACK values read the errors of the group before, the last ones store theirs. */
static inline void grouped_round(const float *row, const float *factor, ptrdiff_t left, int32_t *codes, float *scale,
                                 int32_t *start, float *feedback)
{
    float inverse;
#if VLEN == 16
    const __m512i highest = _mm512_set1_epi32(127), lowest = _mm512_set1_epi32(-128); /* NaN converts to INT32_MIN */
    __m512 v[LK_GROUP / 16], lost = _mm512_setzero_ps();
    __m512i most = _mm512_setzero_si512(), sum = most;
    for (int q = 0; q < LK_GROUP / 16; q++) {
        v[q] = load_scaled(row + 16 * q, factor ? factor + 16 * q : NULL, left - 16 * q);
        if (feedback && q == 0)
            v[q] = _mm512_add_ps(v[q], _mm512_loadu_ps(feedback));
        most = MAX_INT32(most, MAGNITUDE(v[q]));
    }
    *scale = grouped_scale(_mm512_reduce_max_epi32(most), &inverse);
    for (int q = 0; q < LK_GROUP / 16; q++) {
        if (feedback && q > 0)
            v[q] = _mm512_add_ps(v[q], lost);
        const __m512i wanted = _mm512_cvtps_epi32(_mm512_mul_ps(v[q], _mm512_set1_ps(inverse)));
        const __m512i code = _mm512_max_epi32(_mm512_min_epi32(wanted, highest), lowest);
        lost = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(*scale), v[q]);
        _mm_storeu_si128((__m128i *)codes + q, _mm512_cvtsepi32_epi8(code));
        sum = _mm512_add_epi32(sum, code);
    }
    if (feedback)
        _mm512_storeu_ps(feedback, lost);
    *start = -128 * _mm512_reduce_add_epi32(sum);
#else
    float v[LK_GROUP], lost[LK_FEEDBACK];
    int32_t most = 0, sum = 0;
    int8_t made[LK_GROUP];
    for (ptrdiff_t k = 0; k < LK_GROUP; k++) {
        int32_t bits;
        v[k] = k >= left ? 0.0f : factor ? row[k] * factor[k] : row[k];
        v[k] += feedback && k < LK_FEEDBACK ? feedback[k] : 0.0f;
        memcpy(&bits, v + k, sizeof bits);
        bits &= INT32_MAX;
        most = bits > most ? bits : most;
    }
    *scale = grouped_scale(most, &inverse);
    for (int q = 0; q < LK_GROUP; q += LK_FEEDBACK)
        for (int k = q; k < q + LK_FEEDBACK; k++) {
            const float value = feedback && q ? v[k] + lost[k - q] : v[k],
                wanted = inverse > 0 ? rintf(value * inverse) : 0.0f;
            const int32_t code = (int32_t)(wanted > 127.0f ? 127.0f : wanted < -127.0f ? -127.0f : wanted);
            lost[k - q] = fmaf((float)-code, *scale, value);
            made[k] = (int8_t)code;
            sum += code;
        }
    if (feedback)
        memcpy(feedback, lost, sizeof lost);
    memcpy(codes, made, sizeof made);
    *start = -128 * sum;
#endif
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
            const __m128i a = _mm_unpacklo_epi8(rows[0], rows[1]), b = _mm_unpackhi_epi8(rows[0], rows[1]);
            const __m128i d = _mm_unpacklo_epi8(rows[2], rows[3]), e = _mm_unpackhi_epi8(rows[2], rows[3]);
            __m128i *to = (__m128i *)(panel + k * NR + c * 4);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(a, d));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(a, d));
            _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(b, e));
            _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(b, e));
        }
}

/* sums [MR][NR] = strip times panel, over `groups` groups. */
static inline void grouped_tile(const int8_t *codes, const float *scale, const int32_t *start, const int8_t *panel,
                                ptrdiff_t groups, float sums[MR][NR])
{
    memset(sums, 0, sizeof(float[MR][NR]));
    for (ptrdiff_t g = 0; g < groups; g++, scale += MR, start += MR) {
        int32_vector s[MR][2];
        for (int r = 0; r < MR; r++)
            s[r][0] = s[r][1] = BROADCAST(start[r]);
        for (int k = 0; k < LK_GROUP / 4; k++, codes += 4 * MR, panel += 4 * NR) {
            const int32_vector low = LOAD(panel), high = LOAD(panel + 4 * VLEN);
            for (int r = 0; r < MR; r++) {
                int32_t four;
                memcpy(&four, codes + 4 * r, 4);
                const int32_vector x = BROADCAST(four);
                DOT_FOURS(s[r][0], low, x);
                DOT_FOURS(s[r][1], high, x);
            }
        }
        for (int r = 0; r < MR; r++) {
            store(sums[r], load(sums[r]) + TO_FP32(s[r][0]) * scale[r]);
            store(sums[r] + VLEN, load(sums[r] + VLEN) + TO_FP32(s[r][1]) * scale[r]);
        }
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
                    grouped_tile(codes + at * LK_GROUP, row_scale + at, start + at, panel, taken, sums);
                    for (ptrdiff_t r = 0; r < rows; r++) {
                        float *to = dx + (s * MR + r) * in + j;
                        for (ptrdiff_t c = 0; c < width; c++)
                            to[c] = sums[r][c] * ones[c] + (g ? to[c] : 0.0f);
                    }
                }
            }
        }
}
#endif
