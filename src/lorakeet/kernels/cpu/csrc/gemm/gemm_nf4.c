/* The product of an NF4 weight with many fp32 tokens (AVX2, AVX-512), forward and input gradient.
 *
 * A panel at a time is looked up and scaled into the cache, and multiplied there by the tiles of the fp32 product: nothing
 * is rounded but the weight. Reference: kernels/nf4/reference.py.
 */
#include "gemm_f32.h"
#include "nf4.h"
#if defined(__AVX2__)

_Static_assert(F32_KC % NF4_BLOCK == 0, "a block of the depth holds whole blocks of the weight");
_Static_assert(NF4_BLOCK % NR == 0, "the columns of a panel share a scale");

/* Forward: m = W^T, so that columns are output channels. Eight rows of W at a time are transposed. */
static void nf4_pack_channels(const struct f32_factor *m, float *panel, ptrdiff_t j, ptrdiff_t k0, ptrdiff_t size)
{
    const struct nf4_weight *w = m->data;
    _Alignas(64) float rows[8][F32_KC];
    for (ptrdiff_t c = 0; c < NR; c += 8) {
        for (ptrdiff_t r = 0; r < 8; r++) {
            const ptrdiff_t at = (j + c + r) * w->in + k0;
            if (j + c + r >= w->out)
                memset(rows[r], 0, (size_t)size * sizeof(float));
            else
                for (ptrdiff_t k = 0; k < size; k += 2 * VLEN)
                    nf4_values(w->codes + (at + k) / 2, nf4_scale(w, (at + k) / NF4_BLOCK), rows[r] + k);
        }
        for (ptrdiff_t k = 0; k < size; k += 8)
            f32_transpose(rows[0] + k, F32_KC, panel + k * NR + c);
    }
}

/* Backward: m = W, so that columns are input channels. */
static void nf4_pack_inputs(const struct f32_factor *m, float *panel, ptrdiff_t j, ptrdiff_t k0, ptrdiff_t size)
{
    const struct nf4_weight *w = m->data;
    for (ptrdiff_t k = 0; k < size; k++) {
        const ptrdiff_t at = (k0 + k) * w->in + j;
        nf4_values(w->codes + at / 2, nf4_scale(w, at / NF4_BLOCK), panel + k * NR);
    }
}

/* Depth of the blocks, whose sums are added one after the other: whole blocks of the weight. */
static ptrdiff_t nf4_kc(ptrdiff_t depth)
{
    const ptrdiff_t blocks = (depth + F32_KC - 1) / F32_KC, size = (depth + blocks - 1) / blocks;
    return (size + NF4_BLOCK - 1) / NF4_BLOCK * NF4_BLOCK;
}

/* h [n, out] = x W^T + bias for x [n, in]; with `transposed`, the gradient h [n, in] = x W for x [n, out]. `in` is a
 * multiple of 64, bias may be NULL; `strips` has lk_packed_f32_size(n) floats. */
void lk_gemm_nf4(const float *x, const uint8_t *codes, const void *absmax, const float *nested, const float *bias,
                 float *strips, float *h, ptrdiff_t n, ptrdiff_t out, ptrdiff_t in, int transposed)
{
    const struct nf4_weight w = {codes, absmax, nested, out, in};
    if (transposed) {
        const struct f32_factor m = {&w, out, in, 0};
        const struct f32_product product = {x, &m, bias, strips, h, n, nf4_kc(out), 0};
        f32_multiply(&product, nf4_pack_inputs);
    } else {
        const struct f32_factor m = {&w, in, out, 1};
        const struct f32_product product = {x, &m, bias, strips, h, n, nf4_kc(in), 0};
        f32_multiply(&product, nf4_pack_channels);
    }
}
#endif
