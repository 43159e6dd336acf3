/* Operations on one row of a step (AVX2, AVX-512). Each is compiled once, so every row takes the same instructions. */
#include "paged.h"
#if defined(__AVX2__)

/* h [out] += u [rank] v [rank, out]. */
void paged_add(float *restrict h, const float *restrict u, const float *restrict v, ptrdiff_t rank, ptrdiff_t out)
{
    ptrdiff_t j = 0;
    for (; j + 4 * VLEN <= out; j += 4 * VLEN) {
        floats sums[4];
        for (int e = 0; e < 4; e++)
            sums[e] = load(h + j + e * VLEN);
        for (ptrdiff_t r = 0; r < rank; r++)
            for (int e = 0; e < 4; e++)
                sums[e] += u[r] * load(v + r * out + j + e * VLEN);
        for (int e = 0; e < 4; e++)
            store(h + j + e * VLEN, sums[e]);
    }
    for (; j < out; j += VLEN) {
        const ptrdiff_t left = min_of(out - j, VLEN);
        floats sum = (floats)load_scaled(h + j, NULL, left);
        float made[VLEN];
        for (ptrdiff_t r = 0; r < rank; r++)
            sum += u[r] * (floats)load_scaled(v + r * out + j, NULL, left);
        store(made, sum);
        memcpy(h + j, made, (size_t)left * sizeof(float));
    }
}

/* to = x / sqrt(mean(x^2) + eps) * weight; `to` may be x. */
void paged_norm(const struct lk_norm *norm, const float *x, float *to, ptrdiff_t width)
{
    floats squares = {0};
    float lanes[VLEN], sum = 0;
    for (ptrdiff_t k = 0; k < width; k += VLEN)
        squares += (floats)load_scaled(x + k, NULL, width - k) * (floats)load_scaled(x + k, NULL, width - k);
    store(lanes, squares);
    for (int lane = 0; lane < VLEN; lane++)
        sum += lanes[lane];
    const float s = 1.0f / sqrtf(sum / (float)width + norm->eps);
#pragma GCC ivdep
    for (ptrdiff_t k = 0; k < width; k++)
        to[k] = norm->weight[k] * (x[k] * s);
}

/* Rotary position of a head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), its halves. */
void paged_rotate(const float *x, float *to, const float *cosine, const float *sine, ptrdiff_t width)
{
    const ptrdiff_t half = width / 2;
#pragma GCC ivdep /* `to` may be x */
    for (ptrdiff_t k = 0; k < half; k++) {
        const float left = x[k], right = x[k + half];
        to[k] = left * cosine[k] - right * sine[k];
        to[k + half] = right * cosine[k + half] + left * sine[k + half];
    }
}

/* x += more */
void paged_sum(float *restrict x, const float *restrict more, ptrdiff_t width)
{
    for (ptrdiff_t k = 0; k < width; k++)
        x[k] += more[k];
}

/* gate = silu(gate) up */
void paged_gate(float *restrict gate, const float *restrict up, ptrdiff_t width)
{
    for (ptrdiff_t k = 0; k < width; k++)
        gate[k] = gate[k] / (1.0f + exponential(-gate[k])) * up[k];
}
#endif
