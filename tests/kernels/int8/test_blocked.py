"""The back end ``blocked`` against its reference, and the memory that it needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.int8_products import assert_close, layer
from lorakeet.kernels.int8 import blocked, linear
from lorakeet.kernels.int8.format import dequantize
from lorakeet.kernels.int8.reference import int8_linear_reference
from lorakeet.kernels.lora_linear import lora_linear, lora_linear_reference
from lorakeet.quant.int8 import Int8Weight

SHAPES = [(1, 5, 3), (0, 5, 3), (7, 1, 1), (33, 384, 700), (40, 257, 129), (3, 64, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_blocked_equals_the_dequantized_weight(
    shape: tuple[int, int, int], use_back_end: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_back_end("blocked")
    monkeypatch.setattr(blocked, "BLOCK", 1000)
    x, weight, scale, bias = layer(*shape)
    x.requires_grad_()
    h, truth = linear.int8_linear(x, weight, scale, bias), int8_linear_reference(x, weight, scale, bias)
    assert_close(h, truth, 1e-5)
    g = torch.randn_like(truth)
    assert_close(torch.autograd.grad(h, x, g)[0], torch.autograd.grad(truth, x, g)[0], 1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(20, 40, 33), (1, 40, 33), (0, 40, 33)])
def test_with_a_low_rank_update(shape: tuple[int, int, int], p: float, use_back_end: Callable[[str], None]) -> None:
    use_back_end("blocked")
    x, weight, scale, bias = layer(*shape)
    a, b = torch.randn(4, shape[1]), torch.randn(shape[2], 4)
    dense = dequantize(weight, scale)
    grads = []
    for w in (Int8Weight(weight, scale), dense):
        torch.manual_seed(7)  # the same dropout
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        h = lora_linear(leaves[0], w, bias, *leaves[1:], 2.0, p)
        h.sum().mul(0.1).add((h**2).sum()).backward()
        grads.append([h.detach(), *(t.grad for t in leaves)])
    for mine, right in zip(*grads, strict=True):
        assert_close(mine, right, 1e-4)
    if p == 0.0:
        assert_close(grads[0][0], lora_linear_reference(x, Int8Weight(weight, scale), bias, a, b, 2.0), 1e-5)


def test_the_whole_weight_is_never_widened(use_back_end: Callable[[str], None]) -> None:
    use_back_end("blocked")
    x, weight, scale, _ = layer(4, 1024, 3000)
    blocks = blocked.blocks(weight)
    assert len(blocks) > 8 and all(weight[rows].numel() <= 2 * blocked.TILE * 1024 for rows in blocks)
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.shape[-1:] == (1024,):
                made.append(out.numel())
            return out

    with Watch():
        linear.input_gradient(linear.product(x, weight, scale), weight, scale)
    assert len(made) > 16 and max(made) <= 2 * blocked.TILE * 1024 < weight.numel() / 10
