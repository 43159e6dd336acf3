/* The gradient to the input of an 8-bit layer on processors with 8-bit dot products (AVX-512 VNNI, AVX-VNNI).
 *
 * g is rounded to 8 bits with one scale for each GROUP of a row's values: sixteen instructions sum a group in int32, then the
 * sums are scaled and added in fp32. vpdpbusd multiplies unsigned by signed bytes and adds four neighbours: the weight's bytes
 * are moved up by 128 on their way into a panel, and the sums begin at -128 times those of g. Its slow truth is in int8.py.
 */
#include "gemm_tiles.h"
#if defined(__AVX2__)
enum {
    GROUP = 64,   /* values of g that share a scale */
    DEPTH = 2048  /* so much of the weight is packed at once: a panel stays in the second cache */
};

/* Whether the processor has the instruction that this file is for. */
int vnni_is_fast(void)
{
#if defined(NO_DOTS)
    return 0;
#else
    return 1;
#endif
}

ptrdiff_t group_size(void)
{
    return GROUP;
}

static ptrdiff_t groups_of(ptrdiff_t depth)
{
    return (depth + GROUP - 1) / GROUP;
}

/* How many scales, and starts, round_groups writes; GROUP times as many bytes of x. */
ptrdiff_t groups_size(ptrdiff_t n, ptrdiff_t depth)
{
    return (n + STRIP - 1) / STRIP * STRIP * groups_of(depth);
}

/* The scale of a group whose largest magnitude has these bits, and what its values are multiplied by: 1 and 0 for zeros, NaN
 * and 0 where a value is not finite. Values of fp32 order as their bits do, what is not finite above all others. */
static inline float scale_of(int32_t bits, float *inverse)
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

/* GROUP values of a row, `left` of them in memory, times their factors -> int8, zeros beyond them, their scale, and where their
 * sums begin. Unless `carry` is NULL, what a value loses goes to the one LANES further on: the first LANES take what lies there
 * from the group before, the last leave theirs. */
static inline void round_group(const float *row, const float *factor, ptrdiff_t left, int32_t *codes, float *scale,
                               int32_t *start, float *carry)
{
    float inverse;
#if WIDTH == 16
    const __m512i highest = _mm512_set1_epi32(127);
    __m512 v[GROUP / 16], lost;
    __m512i most = _mm512_setzero_si512(), sum = most;
    for (int q = 0; q < GROUP / 16; q++) {
        v[q] = some(row + 16 * q, factor ? factor + 16 * q : NULL, left - 16 * q);
        if (carry && q == 0)
            v[q] = _mm512_add_ps(v[q], _mm512_loadu_ps(carry));
        most = LARGER(most, MAGNITUDE(v[q]));
    }
    *scale = scale_of(_mm512_reduce_max_epi32(most), &inverse);
    for (int q = 0; q < GROUP / 16; q++) {
        if (carry && q > 0)
            v[q] = _mm512_add_ps(v[q], lost);
        const __m512i code = _mm512_min_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v[q], _mm512_set1_ps(inverse))), highest);
        lost = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(*scale), v[q]);
        _mm_storeu_si128((__m128i *)codes + q, _mm512_cvtsepi32_epi8(code));
        sum = _mm512_add_epi32(sum, code);
    }
    if (carry)
        _mm512_storeu_ps(carry, lost);
    *start = -128 * _mm512_reduce_add_epi32(sum);
#else
    float v[GROUP], lost[LANES];
    int32_t most = 0, sum = 0;
    int8_t made[GROUP];
    for (ptrdiff_t k = 0; k < GROUP; k++) {
        int32_t bits;
        v[k] = k >= left ? 0.0f : factor ? row[k] * factor[k] : row[k];
        v[k] += carry && k < LANES ? carry[k] : 0.0f;
        memcpy(&bits, v + k, sizeof bits);
        bits &= INT32_MAX;
        most = bits > most ? bits : most;
    }
    *scale = scale_of(most, &inverse);
    for (int q = 0; q < GROUP; q += LANES)
        for (int k = q; k < q + LANES; k++) {
            const float value = carry && q ? v[k] + lost[k - q] : v[k], wanted = inverse > 0 ? rintf(value * inverse) : 0.0f;
            const int32_t code = (int32_t)(wanted > 127.0f ? 127.0f : wanted < -127.0f ? -127.0f : wanted);
            lost[k - q] = fmaf((float)-code, *scale, value);
            made[k] = (int8_t)code;
            sum += code;
        }
    if (carry)
        memcpy(carry, lost, sizeof lost);
    memcpy(codes, made, sizeof made);
    *start = -128 * sum;
#endif
}

/* x [n, depth] times factor [depth] (or NULL: 1) -> int8 in strips, [strip][four values][row of the strip][4], and of each row
 * of a strip and group its scale and where its sums begin, [strip][group][row]. With `even` what rounding takes from a value is
 * given to a later one of its row. */
void round_groups(const float *x, const float *factor, int8_t *codes, float *scale, int32_t *start, ptrdiff_t n,
                  ptrdiff_t depth, int even)
{
    const ptrdiff_t count = (n + STRIP - 1) / STRIP, groups = groups_of(depth);
    OF_ROWS(n, depth)
    for (ptrdiff_t s = 0; s < count; s++) {
        float carry[STRIP][LANES] = {{0}};
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t at = (s * groups + g) * STRIP;
            int32_t *to = (int32_t *)(codes + at * GROUP);
            for (ptrdiff_t r = 0; r < STRIP; r += 2) {
                int32_t fours[2][GROUP / 4];
                for (ptrdiff_t two = 0; two < 2; two++) {
                    const ptrdiff_t row = s * STRIP + r + two < n ? s * STRIP + r + two : n - 1;
                    round_group(x + row * depth + g * GROUP, factor ? factor + g * GROUP : NULL, depth - g * GROUP, fours[two],
                                scale + at + r + two, start + at + r + two, even ? carry[r + two] : NULL);
                }
                for (int k = 0; k < GROUP / 4; k += 8)
                    put_two(_mm256_loadu_si256((const __m256i *)(fours[0] + k)),
                            _mm256_loadu_si256((const __m256i *)(fours[1] + k)), to + k * STRIP + r);
            }
        }
    }
}

/* weight [out, in], inputs from j on, channels from k0 on -> panel [four values][PANEL][4]. */
static void pack(const int8_t *weight, int8_t *panel, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j, ptrdiff_t k0, ptrdiff_t size)
{
    const __m128i up = _mm_set1_epi8(-128);
    for (ptrdiff_t k = 0; k < size; k += 4)
        for (ptrdiff_t c = 0; c < PANEL; c += 16) {
            __m128i rows[4];
            for (int r = 0; r < 4; r++)
                rows[r] = _mm_xor_si128(sixteen_of(weight, out, in, k0 + k + r, j + c), up);
            const __m128i a = _mm_unpacklo_epi8(rows[0], rows[1]), b = _mm_unpackhi_epi8(rows[0], rows[1]);
            const __m128i d = _mm_unpacklo_epi8(rows[2], rows[3]), e = _mm_unpackhi_epi8(rows[2], rows[3]);
            __m128i *to = (__m128i *)(panel + k * PANEL + c * 4);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(a, d));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(a, d));
            _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(b, e));
            _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(b, e));
        }
}

/* sums [STRIP][PANEL] of one strip and one panel, over `groups` groups. */
static inline void tile(const int8_t *codes, const float *scale, const int32_t *start, const int8_t *panel, ptrdiff_t groups,
                        float sums[STRIP][PANEL])
{
    memset(sums, 0, sizeof(float[STRIP][PANEL]));
    for (ptrdiff_t g = 0; g < groups; g++, scale += STRIP, start += STRIP) {
        sums_of s[STRIP][2];
        for (int r = 0; r < STRIP; r++)
            s[r][0] = s[r][1] = EVERY(start[r]);
        for (int k = 0; k < GROUP / 4; k++, codes += 4 * STRIP, panel += 4 * PANEL) {
            const sums_of low = LOAD(panel), high = LOAD(panel + 4 * WIDTH);
            for (int r = 0; r < STRIP; r++) {
                int32_t four;
                memcpy(&four, codes + 4 * r, 4);
                const sums_of x = EVERY(four);
                PLUS_FOURS(s[r][0], low, x);
                PLUS_FOURS(s[r][1], high, x);
            }
        }
        for (int r = 0; r < STRIP; r++) {
            store(sums[r], load(sums[r]) + IN_FP32(s[r][0]) * scale[r]);
            store(sums[r] + WIDTH, load(sums[r] + WIDTH) + IN_FP32(s[r][1]) * scale[r]);
        }
    }
}

/* dx = (g W8) diag(scale) [n, in] of what round_groups made of g [n, out] times the weight's own scales. scale may be NULL. */
void group_gradient(const int8_t *codes, const float *row_scale, const int32_t *start, const int8_t *weight,
                    const float *scale, float *dx, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in)
{
    const ptrdiff_t groups = groups_of(out), strips = (n + STRIP - 1) / STRIP, panels = (in + PANEL - 1) / PANEL;
    const ptrdiff_t parts = row_parts(panels, n), each = (strips + parts - 1) / parts;
#pragma omp parallel for schedule(dynamic) collapse(2) if (n * in > 4096)
    for (ptrdiff_t p = 0; p < panels; p++)
        for (ptrdiff_t part = 0; part < parts; part++) {
            const ptrdiff_t j = p * PANEL, width = in - j < PANEL ? in - j : PANEL;
            const ptrdiff_t last = (part + 1) * each < strips ? (part + 1) * each : strips;
            _Alignas(64) int8_t panel[DEPTH * PANEL];
            float ones[PANEL];
            for (int c = 0; c < PANEL; c++)
                ones[c] = scale && c < width ? scale[j + c] : 1;
            for (ptrdiff_t g = 0; g < groups; g += DEPTH / GROUP) {
                const ptrdiff_t some = groups - g < DEPTH / GROUP ? groups - g : DEPTH / GROUP;
                pack(weight, panel, out, in, j, g * GROUP, some * GROUP);
                for (ptrdiff_t s = part * each; s < last; s++) {
                    float sums[STRIP][PANEL];
                    const ptrdiff_t at = (s * groups + g) * STRIP, rows = n - s * STRIP < STRIP ? n - s * STRIP : STRIP;
                    tile(codes + at * GROUP, row_scale + at, start + at, panel, some, sums);
                    for (ptrdiff_t r = 0; r < rows; r++) {
                        float *to = dx + (s * STRIP + r) * in + j;
                        for (ptrdiff_t c = 0; c < width; c++)
                            to[c] = sums[r][c] * ones[c] + (g ? to[c] : 0.0f);
                    }
                }
            }
        }
}
#endif
