"""One token through a decoder layer in C against the same in plain torch, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.cpu import build
from lorakeet.kernels.decoder_step import Layer, LinearWeights, Norm, after_attention, before_attention
from lorakeet.kernels.int8.format import dequantize, quantize_weight

pytestmark = pytest.mark.skipif(build.library() is None, reason="nothing is compiled on this machine")
#: Hidden size, heads, heads of the cache, head width, width of the feed-forward block, texts, keys, rank of the adapter.
SHAPES = [(64, 4, 2, 16, 100, 1, 9, 0), (48, 3, 1, 32, 33, 4, 5, 4), (20, 2, 2, 10, 17, 3, 1, 1)]


def linear_weights(out: int, inner: int, rank: int) -> LinearWeights:
    weight, scale = quantize_weight(torch.randn(out, inner) / inner**0.5)
    a, b = (torch.randn(rank, inner), torch.randn(out, rank)) if rank else (None, None)
    return LinearWeights(weight, scale, torch.randn(out), a, b, 0.5)


def apply(weights: LinearWeights, x: Tensor) -> Tensor:
    """Apply a linear layer and its adapter in fp64."""
    h = F.linear(x, dequantize(weights.weight, weights.scale, torch.float64), weights.bias.double())
    if weights.a is None:
        return h
    return h + weights.scaling * (x @ weights.a.double().T) @ weights.b.double().T


def normalize(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cosine.double() + torch.cat((-right, left), -1) * sine.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("one_position", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_step_equals_plain_torch(shape: tuple[int, ...], one_position: bool, masked: bool) -> None:
    hidden, heads, kv_heads, dim, inner, n, length, rank = shape
    wide, narrow = heads * dim, kv_heads * dim
    sizes = [(wide, hidden), *[(narrow, hidden)] * 2, (hidden, wide), *[(inner, hidden)] * 2, (hidden, inner)]
    q, k, v, o, gate, up, down = linears = [linear_weights(*size, rank) for size in sizes]
    before, after, of_q, of_k = norms = [
        *(Norm(torch.rand(hidden), 1e-5) for _ in range(2)),
        *(Norm(torch.rand(dim), 1e-6) if rank else None for _ in range(2)),
    ]
    layer = Layer(linears, norms, dim, dim**-0.5)
    x, positions = torch.randn(n, 1, hidden), 1 if one_position else n
    cosine, sine = torch.randn(2, positions, 1, dim)

    normed = normalize(before, x.double())
    wanted_q, wanted_k = (apply(w, normed).view(n, 1, -1, dim) for w in (q, k))
    wanted_q = rotate(normalize(of_q, wanted_q), cosine[:, None], sine[:, None])
    wanted_k = rotate(normalize(of_k, wanted_k), cosine[:, None], sine[:, None]).transpose(1, 2)
    wanted_v = apply(v, normed).view(n, 1, kv_heads, dim).transpose(1, 2)
    found = before_attention(layer, x, cosine.contiguous(), sine.contiguous())
    for mine, true in zip(found, (wanted_q, wanted_k, wanted_v), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)

    keys, values = torch.randn(2, n, kv_heads, length, dim)
    seen = torch.rand(n, length) > 0.3 if masked else None
    if seen is not None:
        seen[:, 0] = True
    mask = None if seen is None else seen[:, None, None]
    attended = F.scaled_dot_product_attention(
        found[0].double().transpose(1, 2), keys.double(), values.double(), attn_mask=mask, enable_gqa=True
    )
    h = x.double() + apply(o, attended.transpose(1, 2).reshape(n, 1, wide))
    normed = normalize(after, h)
    h = h + apply(down, F.silu(apply(gate, normed)) * apply(up, normed))
    step = after_attention(layer, x, found[0], keys, values, seen)
    torch.testing.assert_close(step.double(), h, rtol=1e-4, atol=1e-4 * float(h.abs().max()))


def test_tensors_of_another_shape_are_refused() -> None:
    layer = Layer(
        [linear_weights(*size, 0) for size in [(32, 16), (32, 16), (32, 16), (16, 32), (8, 16), (8, 16), (16, 8)]],
        [Norm(torch.ones(16), 1e-5), Norm(torch.ones(16), 1e-5), None, None],
        dim=16,
        scaling=0.25,
    )
    x, q, keys = torch.randn(1, 1, 16), torch.randn(1, 1, 2, 16), torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match="must be"):
        after_attention(layer, x, q, keys, keys[:, :1])
    with pytest.raises(ValueError, match=r"the mask is torch.bool \[1, 4\], expected bool \[1, 5\]"):
        after_attention(layer, x, q, keys, keys, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected fp32 on the CPU"):
        after_attention(layer, x, q, keys.double(), keys.double())
