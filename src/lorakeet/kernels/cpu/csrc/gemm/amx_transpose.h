/* A tile of columns from rows of a weight: shared by gemm_amx.c and half/gemm_half_amx.c. */
#ifndef LORAKEET_AMX_TRANSPOSE_H
#define LORAKEET_AMX_TRANSPOSE_H

#include "gemm_tiles.h"
#if defined(__AVX2__)

/* Sixteen rows of sixteen dwords -> their transpose. */
static inline void amx_transpose(const int8_t *from, ptrdiff_t stride, int8_t *to)
{
#if VLEN == 16
    __m512i a[16], b[16];
    for (int r = 0; r < 16; r++)
        a[r] = LOAD(from + r * stride);
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 16; r += 4)
        for (int c = 0; c < 2; c++) { /* a[r + column % 4] has columns 0, 4, 8, 12 of rows r...r + 3, from that column on */
            a[r + 2 * c] = _mm512_unpacklo_epi64(b[r + c], b[r + c + 2]);
            a[r + 2 * c + 1] = _mm512_unpackhi_epi64(b[r + c], b[r + c + 2]);
        }
    for (int c = 0; c < 4; c++) {
        const __m512i even = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88), odd = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xDD);
        const __m512i up = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88),
                      more = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xDD);
        _mm512_storeu_si512(to + c * 64, _mm512_shuffle_i32x4(even, up, 0x88));
        _mm512_storeu_si512(to + (c + 8) * 64, _mm512_shuffle_i32x4(even, up, 0xDD));
        _mm512_storeu_si512(to + (c + 4) * 64, _mm512_shuffle_i32x4(odd, more, 0x88));
        _mm512_storeu_si512(to + (c + 12) * 64, _mm512_shuffle_i32x4(odd, more, 0xDD));
    }
#else
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 16; c++)
            memcpy(to + c * 64 + r * 4, from + r * stride + c * 4, 4);
#endif
}
#endif
#endif
