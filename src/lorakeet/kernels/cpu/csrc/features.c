/* Features of the processor that this library's code can use. Nothing else in the package asks the processor. */
#include "gemm/amx.h"
#include "gemm/gemm_tiles.h"
#if defined(AMX_COMPILED) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA of asm/prctl.h */

/* Whether the tiles are the processor's, and Linux lets this process use them. Linux grants that to all of its threads. */
static inline int has_tiles(void)
{
#if defined(AMX_COMPILED) && defined(__linux__)
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

/* Whether the tiles are plain C. */
int lk_emulates_amx(void)
{
#if defined(AMX_COMPILED)
    return 0;
#else
    return 1;
#endif
}

/* Names separated by spaces, as in cpu/features.py. An instruction set is listed if the code was compiled for it.
 *
 * The library is compiled for the processor that runs it, so this needs no CPUID. Instructions that the kernel of the
 * operating system must permit belong here too: ask, and leave the name out if the answer is no. */
const char *lk_cpu_features(void)
{
#if defined(__AVX2__)
#if defined(__AVX512BW__)
#define WIDE " avx512"
#else
#define WIDE ""
#endif
#if defined(NO_DOTS)
#define DOTS ""
#else
#define DOTS " vnni"
#endif
#define NAMES "avx2" WIDE DOTS
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd"))
        return NAMES " amd";
    return has_tiles() ? NAMES " amx" : NAMES;
#else
    return "";
#endif
}
