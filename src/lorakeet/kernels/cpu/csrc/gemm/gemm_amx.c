/* The products of gemm_w8a16.c (forward) and gemm_w8a8_grouped.c in tiles of AMX: the same numbers, to the bit.
 *
 * Forward, a row of x is rounded to int16 as there, and split into two planes of bytes, 256 high + low. Both are multiplied
 * with the stored weight; the int32 sums are exact. Backward, a tile is as deep as a group. Scales, bias and low-rank
 * product are added by the very functions of those files, in their blocks. The weight is laid out for tiles a panel at a
 * time, in the cache. Reference: gemm_w8a16.c and gemm_w8a8_grouped.c.
 */
#include "amx.h"
#include "amx_transpose.h"
#include "w8a16.h"
#include "w8a16_epilogue.h"
#include "w8a8_grouped.h"
#if defined(__AVX2__)

enum {
    AMX_NR = 2 * TILE_ROWS, /* columns of a panel: two tiles */
    AMX_PANELS = 2,         /* panels that a row tile is multiplied with while it is in the L1 cache */
    AMX_STEPS = (W8A16_KC + TILE_DEPTH - 1) / TILE_DEPTH, /* tiles of a block's depth, at most */
    AMX_GROUPS = GROUPED_KC / LK_GROUP                    /* groups of a block */
};
_Static_assert(LK_GROUP == (int)TILE_DEPTH, "a tile is as deep as a group");
_Static_assert(AMX_NR % NR == 0, "a panel of AMX holds whole panels of the epilogues");

#if !defined(AMX_COMPILED)
_Thread_local struct tiles emulated_tiles;
#endif

static ptrdiff_t row_tiles(ptrdiff_t n)
{
    return (n + TILE_ROWS - 1) / TILE_ROWS;
}

/* Tiles of the depth of a block of x. */
static ptrdiff_t amx_steps(ptrdiff_t depth)
{
    return (w8a16_kc(depth) + TILE_DEPTH - 1) / TILE_DEPTH;
}

/* Number of bytes that lk_pack_a16_amx writes. */
ptrdiff_t lk_packed_a16_amx_size(ptrdiff_t n, ptrdiff_t depth)
{
    const ptrdiff_t size = depth ? w8a16_kc(depth) : 1;
    return depth ? row_tiles(n) * ((depth + size - 1) / size) * amx_steps(depth) * 2 * TILE_BYTES : 0;
}

/* Split sixteen int16 into their high and low bytes. */
static inline void amx_split(__m256i codes, int8_t *high, int8_t *low)
{
    const __m256i up = _mm256_srli_epi16(codes, 8), down = _mm256_and_si256(codes, _mm256_set1_epi16(255));
    _mm_storeu_si128((__m128i *)high, _mm_packus_epi16(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1)));
    _mm_storeu_si128((__m128i *)low, _mm_packus_epi16(_mm256_castsi256_si128(down), _mm256_extracti128_si256(down, 1)));
}

/* x [n, depth] times factor [depth] (or NULL: 1) -> two planes of bytes of the int16 that lk_pack_a16 makes, in tiles
 * [block][row tile][step][high, low][row][TILE_DEPTH], and the scale of each row. Steps end with their block. */
void lk_pack_a16_amx(const float *x, const float *factor, int8_t *tiles, float *scale, ptrdiff_t n, ptrdiff_t depth,
                     int error_feedback)
{
    const ptrdiff_t size = w8a16_kc(depth), steps = amx_steps(depth), count = row_tiles(n);
    const float most = a16_limit(depth);
    PARALLEL_ROWS(count * TILE_ROWS, depth)
    for (ptrdiff_t i = 0; i < count * TILE_ROWS; i++) {
        const float *row = x + i * depth, each = i < n ? a16_row_scale(row, factor, depth, most) : 1.0f;
        float feedback[LK_FEEDBACK] = {0};
        if (i < n)
            scale[i] = each;
        for (ptrdiff_t from = 0, block = 0; from < depth; from += size, block++) {
            int8_t *to = tiles + (block * count + i / TILE_ROWS) * steps * 2 * TILE_BYTES + i % TILE_ROWS * TILE_DEPTH;
            for (ptrdiff_t k = 0; k < steps * TILE_DEPTH; k += W8A16_K_STEP) {
                __m256i codes = _mm256_setzero_si256();
                if (i < n && k < size)
                    codes = a16_round(row + from + k, factor ? factor + from + k : NULL, depth - from - k, 1.0f / each,
                                      error_feedback ? feedback : NULL);
                int8_t *high = to + k / TILE_DEPTH * 2 * TILE_BYTES + k % TILE_DEPTH;
                amx_split(codes, high, high + TILE_BYTES);
            }
        }
    }
}

/* weight [out, in], channels from j on, inputs from k0 on -> panel [step][two tiles of columns][inputs / 4][column][4]; zeros
 * beyond its edges. */
static void amx_pack_channels(const int8_t *weight, int8_t *panel, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j, ptrdiff_t k0,
                              ptrdiff_t steps)
{
    for (ptrdiff_t c = j; c < j + AMX_NR; c += TILE_ROWS)
        for (ptrdiff_t s = 0; s < steps; s++) {
            int8_t edge[TILE_BYTES];
            const ptrdiff_t rows = min_of(out - c, TILE_ROWS), left = min_of(in - k0 - s * TILE_DEPTH, TILE_DEPTH);
            const int8_t *from = weight + c * in + k0 + s * TILE_DEPTH;
            ptrdiff_t stride = in;
            if (rows < TILE_ROWS || left < TILE_DEPTH) {
                memset(edge, 0, sizeof edge);
                for (ptrdiff_t r = 0; r < rows && left > 0; r++)
                    memcpy(edge + r * TILE_DEPTH, from + r * in, (size_t)left);
                from = edge;
                stride = TILE_DEPTH;
            }
            amx_transpose(from, stride, panel + (2 * s + (c - j) / TILE_ROWS) * TILE_BYTES);
        }
}

/* sums [high, low][two tiles of columns][16][16] = tiles of x times a panel. */
static inline void amx_multiply(const int8_t *tiles, const int8_t *panel, ptrdiff_t steps, int32_t sums[4][TILE_BYTES / 4])
{
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (ptrdiff_t s = 0; s < steps; s++, tiles += 2 * TILE_BYTES, panel += 2 * TILE_BYTES) {
        tile_load(4, tiles);
        tile_load(6, panel);
        tile_dot_signed(0, 4, 6);
        tile_load(7, panel + TILE_BYTES);
        tile_dot_signed(1, 4, 7);
        tile_load(5, tiles + TILE_BYTES);
        tile_dot_unsigned(2, 5, 6);
        tile_dot_unsigned(3, 5, 7);
    }
    tile_store(0, sums[0]);
    tile_store(1, sums[1]);
    tile_store(2, sums[2]);
    tile_store(3, sums[3]);
}

/* The sums 256 high + low of VLEN columns of a panel, from column c on, of row r. */
static inline int32_vector amx_joined(int32_t sums[4][TILE_BYTES / 4], ptrdiff_t r, ptrdiff_t c)
{
    const ptrdiff_t at = r * TILE_ROWS + c % TILE_ROWS;
    const int32_vector high = LOAD(sums[c / TILE_ROWS] + at), low = LOAD(sums[2 + c / TILE_ROWS] + at);
#if VLEN == 16
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
#else
    return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low);
#endif
}

/* h = (x W8^T) diag(scale) + bias + u v [n, out], as lk_gemm_w8a16 has it, for x [n, in] packed by lk_pack_a16_amx. */
void lk_gemm_w8a16_amx(const int8_t *tiles, const float *row_scale, const int8_t *weight, const float *scale,
                       const float *bias, const float *u, const float *v, ptrdiff_t rank, float *h, ptrdiff_t n,
                       ptrdiff_t out, ptrdiff_t in)
{
    const ptrdiff_t size = w8a16_kc(in), steps = amx_steps(in), count = row_tiles(n), wide = AMX_PANELS * AMX_NR;
    const ptrdiff_t sides = (out + wide - 1) / wide, parts = row_parts(sides, n), each = (count + parts - 1) / parts;
#pragma omp parallel if (n * out > 4096)
    {
        tiles_configure();
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t p = 0; p < sides; p++)
            for (ptrdiff_t part = 0; part < parts; part++) {
                const ptrdiff_t first = p * wide, width = min_of(out - first, wide), last = min_of((part + 1) * each, count);
                _Alignas(64) int8_t panels[AMX_PANELS][AMX_STEPS * 2 * TILE_BYTES];
                _Alignas(64) int32_t sums[4][TILE_BYTES / 4];
                struct w8a16_columns columns[AMX_PANELS * AMX_NR / NR];
                for (ptrdiff_t j = 0; j < width; j += NR)
                    w8a16_load_columns(&columns[j / NR], scale, bias, v, rank, first + j, out);
                for (ptrdiff_t from = 0, block = 0; from < in; from += size, block++) {
                    for (ptrdiff_t j = 0; j < width; j += AMX_NR)
                        amx_pack_channels(weight, panels[j / AMX_NR], out, in, first + j, from, steps);
                    for (ptrdiff_t t = part * each; t < last; t++)
                        for (ptrdiff_t j = 0; j < width; j += AMX_NR) {
                            amx_multiply(tiles + (block * count + t) * steps * 2 * TILE_BYTES, panels[j / AMX_NR], steps,
                                         sums);
                            for (ptrdiff_t i = t * TILE_ROWS; i < min_of(n, (t + 1) * TILE_ROWS); i++)
                                for (ptrdiff_t c = j; c < min_of(width, j + AMX_NR); c += NR) {
                                    const int32_vector made[2] = {amx_joined(sums, i % TILE_ROWS, c - j),
                                                                  amx_joined(sums, i % TILE_ROWS, c - j + VLEN)};
                                    w8a16_write(made, row_scale[i], &columns[c / NR], u + i * rank, rank,
                                                h + i * out + first + c, from == 0);
                                }
                        }
                }
            }
        tiles_release();
    }
}

/* Number of bytes that lk_pack_a8_amx writes, and groups with a scale for each row of a tile. */
ptrdiff_t lk_packed_a8_amx_groups(ptrdiff_t n, ptrdiff_t depth)
{
    return row_tiles(n) * TILE_ROWS * groups_of(depth);
}

/* x [n, depth] times factor [depth] (or NULL: 1) -> the int8 that lk_pack_a8_grouped makes, in tiles
 * [row tile][group][row][LK_GROUP], and the scales, [row tile][group][row]. */
void lk_pack_a8_amx(const float *x, const float *factor, int8_t *tiles, float *scale, ptrdiff_t n, ptrdiff_t depth,
                    int error_feedback)
{
    const ptrdiff_t count = row_tiles(n), groups = groups_of(depth);
    PARALLEL_ROWS(count * TILE_ROWS, depth)
    for (ptrdiff_t i = 0; i < count * TILE_ROWS; i++) {
        float feedback[LK_FEEDBACK] = {0};
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t at = (i / TILE_ROWS * groups + g) * TILE_ROWS + i % TILE_ROWS;
            int32_t start;
            scale[at] = 1.0f;
            if (i < n)
                grouped_round(x + i * depth + g * LK_GROUP, factor ? factor + g * LK_GROUP : NULL, depth - g * LK_GROUP,
                              (int32_t *)(tiles + at * LK_GROUP), scale + at, &start, error_feedback ? feedback : NULL);
            else
                memset(tiles + at * LK_GROUP, 0, LK_GROUP);
        }
    }
}

/* weight [out, in], inputs from j on, channels from k0 on -> panel [group][two tiles of columns][channels / 4][column][4];
 * zeros beyond its edges. */
static void amx_pack_inputs(const int8_t *weight, int8_t *panel, ptrdiff_t out, ptrdiff_t in, ptrdiff_t j, ptrdiff_t k0,
                            ptrdiff_t groups)
{
    for (ptrdiff_t k = 0; k < groups * LK_GROUP; k += 4)
        for (ptrdiff_t c = 0; c < 2; c++) {
            __m128i rows[4];
            for (int r = 0; r < 4; r++)
                rows[r] = load_sixteen(weight, out, in, k0 + k + r, j + c * TILE_ROWS);
            interleave_four(rows, panel + (k / LK_GROUP * 2 + c) * TILE_BYTES + k % LK_GROUP * TILE_ROWS);
        }
}

/* sums [16] of AMX_NR columns = the groups of a row tile times a tile of columns of a panel. A group's sums are added while
 * the next one's are multiplied. */
static inline void amx_groups(const int8_t *tiles, const float *scale, const int8_t *panel, ptrdiff_t groups, float *sums)
{
    enum { PARTS = TILE_ROWS / VLEN };
    _Alignas(64) int32_t made[2][TILE_ROWS][TILE_ROWS];
    floats total[TILE_ROWS][PARTS];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int part = 0; part < PARTS; part++)
            total[r][part] = (floats){0};
    for (ptrdiff_t g = 0; g <= groups; g++) {
        if (g < groups) {
            tile_zero(0);
            tile_load(1, tiles + g * TILE_BYTES);
            tile_load(2, panel + g * 2 * TILE_BYTES);
            tile_dot_signed(0, 1, 2);
            tile_store(0, made[g % 2]);
        }
        if (g == 0)
            continue;
        for (int r = 0; r < TILE_ROWS; r++)
            for (int part = 0; part < PARTS; part++)
                total[r][part] = grouped_add(total[r][part], LOAD(made[(g - 1) % 2][r] + part * VLEN),
                                             scale[(g - 1) * TILE_ROWS + r]);
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int part = 0; part < PARTS; part++)
            store(sums + r * AMX_NR + part * VLEN, total[r][part]);
}

/* dx = (g W8) diag(scale) [n, in], as lk_gemm_w8a8_grouped_dgrad has it, for g [n, out] packed by lk_pack_a8_amx. */
void lk_gemm_w8a8_amx_dgrad(const int8_t *tiles, const float *row_scale, const int8_t *weight, const float *scale, float *dx,
                            ptrdiff_t n, ptrdiff_t out, ptrdiff_t in)
{
    const ptrdiff_t groups = groups_of(out), count = row_tiles(n), panels = (in + AMX_NR - 1) / AMX_NR;
    const ptrdiff_t parts = row_parts(panels, n), each = (count + parts - 1) / parts;
#pragma omp parallel if (n * in > 4096)
    {
        tiles_configure();
#pragma omp for schedule(dynamic) collapse(2)
        for (ptrdiff_t p = 0; p < panels; p++)
            for (ptrdiff_t part = 0; part < parts; part++) {
                const ptrdiff_t j = p * AMX_NR, width = min_of(in - j, AMX_NR), last = min_of((part + 1) * each, count);
                _Alignas(64) int8_t panel[AMX_GROUPS * 2 * TILE_BYTES];
                float ones[AMX_NR];
                for (int c = 0; c < AMX_NR; c++)
                    ones[c] = scale && c < width ? scale[j + c] : 1;
                for (ptrdiff_t g = 0; g < groups; g += AMX_GROUPS) {
                    const ptrdiff_t taken = min_of(groups - g, AMX_GROUPS);
                    amx_pack_inputs(weight, panel, out, in, j, g * LK_GROUP, taken);
                    for (ptrdiff_t t = part * each; t < last; t++) {
                        float sums[TILE_ROWS][AMX_NR];
                        const ptrdiff_t at = (t * groups + g) * TILE_ROWS;
                        for (ptrdiff_t c = 0; c < width; c += TILE_ROWS)
                            amx_groups(tiles + at * LK_GROUP, row_scale + at, panel + c / TILE_ROWS * TILE_BYTES, taken,
                                       sums[0] + c);
                        for (ptrdiff_t i = t * TILE_ROWS; i < min_of(n, (t + 1) * TILE_ROWS); i++)
                            for (ptrdiff_t c = 0; c < width; c += NR)
                                grouped_write(sums[i % TILE_ROWS] + c, ones + c, dx + i * in + j + c,
                                              min_of(width - c, NR), g == 0);
                    }
                }
            }
        tiles_release();
    }
}
#endif
