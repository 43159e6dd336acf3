/* Tiles of AMX-INT8 and AMX-BF16: eight registers of 16 rows of 64 bytes, and eight instructions, all tiles in full size.
 *
 * tile_dot_* adds to each int32 [16, 16] of a tile the products of sixteen rows a [16][64] by sixteen columns b, four
 * neighbouring values of a column together: b [16][16 columns][4]. A tile's number is a literal. tile_dot_bf16 adds to each
 * fp32 the products of bf16, two neighbouring values together: a [16][32], b [16][16 columns][2]. It rounds to the nearest,
 * takes denormal numbers for zeros, and makes none.
 *
 * Where the compiler's target lacks one of both, or LK_EMULATE_AMX is defined, the same is plain C: exact and slow, for the tests.
 */
#ifndef LORAKEET_AMX_H
#define LORAKEET_AMX_H

#include "../common.h"
#include <float.h>
#include <string.h>

enum {
    TILE_ROWS = 16,                     /* rows of a tile */
    TILE_DEPTH = 64,                    /* bytes of a row: the depth of one instruction */
    TILE_BYTES = TILE_ROWS * TILE_DEPTH /* bytes of a tile, and int32 values times four */
};

/* The configuration that ldtilecfg reads. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct tile_config) == 64, "ldtilecfg reads 64 bytes");

#define EIGHT(value) {value, value, value, value, value, value, value, value}
/* Constant: gcc 12 believes that ldtilecfg reads eight bytes, and would drop the stores of a local one. */
static const _Alignas(64) struct tile_config TILE_CONFIG = {
    .palette = 1, .row_bytes = EIGHT(TILE_DEPTH), .rows = EIGHT(TILE_ROWS)};

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && !defined(LK_EMULATE_AMX)
#define AMX_COMPILED
#include <immintrin.h>

/* gcc 12 does not know that tileloadd reads memory: stores before it must not move behind it. */
#define TILE_BARRIER __asm__ volatile("" ::: "memory")
#define tiles_configure() _tile_loadconfig(&TILE_CONFIG)
#define tiles_release() _tile_release()
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from)                                                                                             \
    do {                                                                                                               \
        TILE_BARRIER;                                                                                                  \
        _tile_loadd(t, from, TILE_DEPTH);                                                                              \
    } while (0)
#define tile_store(t, to) _tile_stored(t, to, TILE_DEPTH)
#define tile_dot_signed(t, a, b) _tile_dpbssd(t, a, b)
#define tile_dot_unsigned(t, a, b) _tile_dpbusd(t, a, b) /* a is unsigned, b signed */
#define tile_dot_bf16(t, a, b) _tile_dpbf16ps(t, a, b)
#else

/* The tiles of a thread. As in the processor, none may be used before they are configured, or after their release. */
struct tiles {
    struct tile_config config;
    uint8_t bytes[8][TILE_BYTES];
};
extern HIDDEN _Thread_local struct tiles emulated_tiles;

static inline uint8_t *tile_bytes(int t)
{
    if (emulated_tiles.config.palette != 1 || emulated_tiles.config.rows[t] != TILE_ROWS ||
        emulated_tiles.config.row_bytes[t] != TILE_DEPTH)
        __builtin_trap();
    return emulated_tiles.bytes[t];
}

static inline void tile_dot(int t, int a, int b, int is_unsigned)
{
    int32_t sums[TILE_ROWS][TILE_ROWS];
    const uint8_t *left = tile_bytes(a);
    const int8_t *right = (const int8_t *)tile_bytes(b);
    memcpy(sums, tile_bytes(t), sizeof sums);
    for (int r = 0; r < TILE_ROWS; r++)
        for (int k = 0; k < TILE_DEPTH; k++) {
            const int value = is_unsigned ? left[r * TILE_DEPTH + k] : (int8_t)left[r * TILE_DEPTH + k];
            for (int c = 0; c < TILE_ROWS; c++)
                sums[r][c] += value * right[k / 4 * TILE_DEPTH + c * 4 + k % 4];
        }
    memcpy(tile_bytes(t), sums, sizeof sums);
}

/* A number in place of a denormal one: zero. */
static inline float tile_flushed(float value)
{
    return fabsf(value) < FLT_MIN ? copysignf(0.0f, value) : value;
}

static inline float tile_widened(const uint8_t *bf16)
{
    uint16_t upper;
    memcpy(&upper, bf16, sizeof upper);
    const uint32_t bits = (uint32_t)upper << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return tile_flushed(value);
}

/* The even values of the depth are summed, and the odd ones, each product added in one rounding; then both are added. */
static inline void tile_dot_bf16(int t, int a, int b)
{
    float sums[TILE_ROWS][TILE_ROWS];
    const uint8_t *left = tile_bytes(a), *right = tile_bytes(b);
    memcpy(sums, tile_bytes(t), sizeof sums);
    for (int r = 0; r < TILE_ROWS; r++)
        for (int c = 0; c < TILE_ROWS; c++) {
            float each[2] = {0, 0};
            for (int k = 0; k < TILE_DEPTH / 2; k++)
                each[k % 2] = tile_flushed(fmaf(tile_widened(left + r * TILE_DEPTH + 2 * k),
                                                tile_widened(right + k / 2 * TILE_DEPTH + c * 4 + k % 2 * 2), each[k % 2]));
            float both = tile_flushed(each[0] + each[1]);
            __asm__("" : "+m"(both)); /* sums may be reordered otherwise */
            sums[r][c] = tile_flushed(tile_flushed(sums[r][c]) + both);
        }
    memcpy(tile_bytes(t), sums, sizeof sums);
}

#define tiles_configure() (void)(emulated_tiles.config = TILE_CONFIG)
#define tiles_release() (void)memset(&emulated_tiles.config, 0, sizeof emulated_tiles.config)
#define tile_zero(t) (void)memset(tile_bytes(t), 0, TILE_BYTES)
#define tile_load(t, from) (void)memcpy(tile_bytes(t), from, TILE_BYTES)
#define tile_store(t, to) (void)memcpy(to, tile_bytes(t), TILE_BYTES)
#define tile_dot_signed(t, a, b) tile_dot(t, a, b, 0)
#define tile_dot_unsigned(t, a, b) tile_dot(t, a, b, 1)
#endif
#endif
