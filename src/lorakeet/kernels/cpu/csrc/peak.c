/* Loops that stay in registers: the most that each kind of multiplication reaches on this processor. */
#include "gemm/amx.h"
#include "gemm/gemm_tiles.h"

#if defined(__AVX2__)
enum { CHAINS = 10 }; /* independent sums, which hide the latency */
#define EACH_CHAIN _Pragma("GCC unroll 10") for (int c = 0; c < CHAINS; c++)
#define KEEP(v) __asm__ volatile("" : "+v"(v)) /* the compiler must not know the value */

/* Each loop returns the operations of one thread. */
static ptrdiff_t peak_f32(ptrdiff_t turns)
{
    floats s[CHAINS] = {{0}}, a = {0};
    for (ptrdiff_t t = 0; t < turns; t++)
        EACH_CHAIN {
            KEEP(a); /* or the compiler multiplies once, and only adds afterwards */
            s[c] = multiply_add(a, a, s[c]);
        }
    EACH_CHAIN KEEP(s[c]);
    return turns * CHAINS * VLEN * 2;
}

static ptrdiff_t peak_pairs(ptrdiff_t turns)
{
    int32_vector s[CHAINS], a = BROADCAST(0);
    EACH_CHAIN s[c] = a;
    for (ptrdiff_t t = 0; t < turns; t++)
        EACH_CHAIN DOT_PAIRS(s[c], a, a);
    EACH_CHAIN KEEP(s[c]);
    return turns * CHAINS * VLEN * 4;
}

static ptrdiff_t peak_fours(ptrdiff_t turns)
{
    int32_vector s[CHAINS], a = BROADCAST(0);
    EACH_CHAIN s[c] = a;
    for (ptrdiff_t t = 0; t < turns; t++)
        EACH_CHAIN DOT_FOURS(s[c], a, a);
    EACH_CHAIN KEEP(s[c]);
    return turns * CHAINS * VLEN * 8;
}

static ptrdiff_t peak_tiles(ptrdiff_t turns)
{
    tiles_configure();
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tile_zero(4);
    tile_zero(5);
    for (ptrdiff_t t = 0; t < turns; t++) {
        tile_dot_signed(0, 4, 5);
        tile_dot_signed(1, 4, 5);
        tile_dot_signed(2, 4, 5);
        tile_dot_signed(3, 4, 5);
    }
    tiles_release();
    return turns * 4 * TILE_ROWS * TILE_ROWS * TILE_DEPTH * 2;
}
#endif

/* Run a loop in every thread: 0 fp32, 1 pairs of int16, 2 fours of int8, 3 tiles of AMX. Returns the operations of all
 * threads; 0 without AVX2. */
ptrdiff_t lk_peak(int kind, ptrdiff_t turns)
{
    ptrdiff_t sum = 0;
#if defined(__AVX2__)
    ptrdiff_t (*const loops[])(ptrdiff_t) = {peak_f32, peak_pairs, peak_fours, peak_tiles};
    if (kind < 0 || kind > 3)
        return 0;
#pragma omp parallel reduction(+ : sum)
    sum += loops[kind](turns);
#else
    (void)kind, (void)turns;
#endif
    return sum;
}
