/* Features of the processor that this library's code can use. Nothing else in the package asks the processor. */
#include "gemm/gemm_tiles.h"

/* Names separated by spaces, as in cpu/features.py. An instruction set is listed if the code was compiled for it.
 *
 * The library is compiled for the processor that runs it, so this needs no CPUID. Instructions that the kernel of the
 * operating system must permit belong here too: ask once, and leave the name out if the answer is no. For AMX on Linux
 * that is syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
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
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") ? "avx2" WIDE DOTS " amd" : "avx2" WIDE DOTS;
#else
    return "";
#endif
}
