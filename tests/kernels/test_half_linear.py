"""A weight in 16 bits against the same weight in fp32: the same bits for many tokens, rounding of the sums for few."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorakeet.errors import ConfigError
from lorakeet.kernels import half_linear as module
from lorakeet.kernels.cpu import features, gemm
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.fixed_order import fixed_order
from lorakeet.kernels.frozen_linear import frozen_linear, linear_out
from lorakeet.kernels.half_linear import half_linear, half_linear_reference, input_gradient, product

#: Tokens, outputs, inputs: few and many tokens, empty ones, edges of tiles, several blocks of the depth.
SHAPES = [
    *[(1, 1, 1), (1, 7, 16), (3, 5, 33), (16, 130, 70), (17, 8, 5), (19, 37, 709), (33, 2101, 70), (40, 33, 1300)],
    *[(0, 4, 8), (4, 0, 8), (5, 3, 0), (20, 1, 9), (20, 9, 1)],
]
HALF = [torch.bfloat16, torch.float16]


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, g, weight and bias, with denormal numbers and the largest ones among the weights."""
    n, out, inner = shape
    draw = torch.Generator().manual_seed(n + out)
    x, g, weight, bias = (torch.randn(size, generator=draw) for size in ((n, inner), (n, out), (out, inner), (out,)))
    weight = weight.to(dtype)
    if weight.numel() > 9:
        low = torch.finfo(dtype).smallest_normal
        weight.view(-1)[:9] = torch.tensor([0.0, -0.0, low, low / 4, -low / 64, 3e4, -3e4, 1 / 3, -1e-3]).to(dtype)
    return [x, g, weight, bias]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are equal, those of NaN too."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.fixture(params=["tiles", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Who multiplies: the compiled tiles, for fp32 too, or torch with the widened weight."""
    if request.param == "tiles" and not features.has(Feature.AVX2):
        pytest.skip("nothing is compiled for this processor")
    monkeypatch.setattr(gemm, "has_fast_f32", lambda: request.param == "tiles")
    if request.param == "torch":
        monkeypatch.setattr(features, "has", lambda _: False)
    yield request.param


@pytest.mark.parametrize("dtype", HALF)
def test_products_have_the_bits_of_the_widened_weight(way: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, g, weight, bias = operands(shape, dtype)
        wide, low = weight.float(), [torch.randn(size, 3) for size in shape]
        with fixed_order():
            for b in (bias, None):
                assert same(product(x, weight, b), linear_out(x, wide.T, b)), shape
            assert same(input_gradient(g, weight), linear_out(g, wide, None)), shape
        if shape[0] <= gemm.GEMV_TOKENS:
            truth = x.double() @ weight.double().T + bias + low[0] @ low[1].T.double().float()
            found = product(x, weight, bias, (low[0], low[1]))
            assert not truth.numel() or float((found - truth).abs().max() / truth.abs().max()) < 2e-6, shape


@pytest.mark.parametrize("dtype", HALF)
def test_nan_and_infinity_stay_in_their_channel(way: str, dtype: torch.dtype) -> None:
    for value, n in ((float("nan"), 3), (float("inf"), 3), (float("nan"), 20), (-float("inf"), 20)):
        x, _, weight, bias = operands((n, 6, 40), dtype)
        weight[4, 11] = value
        finite = product(x, weight, bias).isfinite()
        assert not finite[:, 4].any() and finite[:, [0, 1, 2, 3, 5]].all()


@pytest.mark.parametrize("shape", [(5,), (1, 7), (2, 3, 33), (0, 4), (300, 129)])
def test_layer_equals_the_fp32_layer_forward_and_backward(shape: tuple[int, ...], way: str) -> None:
    draw = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(37, shape[-1], generator=draw).bfloat16(), torch.randn(37, generator=draw)
    found = []
    for function, given in ((half_linear, weight), (frozen_linear, weight.float())):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(4)).requires_grad_()
        with fixed_order():
            h = function(x, given, bias)
            (dx,) = torch.autograd.grad(h, x, torch.linspace(-1, 1, h.numel()).view(h.shape))
        found.append((h.detach(), dx))
    assert all(map(same, *found))


def test_strided_rows_other_dtypes_and_autocast() -> None:
    x, _, weight, bias = operands((24, 9, 33), torch.bfloat16)
    strided = torch.randn(24, 66)[:, ::2]
    assert same(product(strided, weight, bias), product(strided.contiguous(), weight, bias))
    half = half_linear(x.bfloat16(), weight, bias)
    assert half.dtype == torch.bfloat16 and torch.equal(
        half, half_linear_reference(x.bfloat16(), weight, bias.bfloat16())
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half_linear(x, weight, bias), half)
    assert half_linear(x.double(), weight, bias).dtype == torch.float64


def test_the_number_of_threads_changes_no_bit() -> None:
    x, g, weight, bias = operands((90, 257, 300), torch.bfloat16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append([product(x, weight, bias), input_gradient(g, weight), product(x[:3], weight, bias)])
    torch.set_num_threads(before)
    assert all(map(same, *found))


def test_few_tokens_read_no_wider_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    if not features.has(Feature.AVX2):
        pytest.skip("nothing is compiled for this processor")
    monkeypatch.setattr(module, "linear_out", lambda *_: pytest.fail("the weight was widened"))
    for n in (1, 4, 40):
        x, g, weight, bias = operands((n, 30, 50), torch.bfloat16)
        product(x, weight, bias)
        if n == 40:
            input_gradient(g, weight)


needs_tiles = pytest.mark.skipif(Feature.AMX not in features.runnable(), reason="nothing is compiled for tiles")


@needs_tiles
def test_tiles_keep_16_bits_of_each_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_HALF", "amx")
    for shape in (*SHAPES, (50, 3, 70), (90, 64, 32)):
        x, g, weight, bias = operands(shape, torch.bfloat16)
        x, wide = x * torch.logspace(-6, 6, shape[0])[:, None], weight.double()
        for found, a, b, more in (
            (product(x, weight, bias), x, wide.T, bias),
            (input_gradient(g, weight), g, wide, torch.zeros(())),
        ):
            size = a.double().abs() @ b.abs() + more.double().abs()
            assert bool(((found - (a.double() @ b + more)).abs() <= size / 2**16).all()), shape


@needs_tiles
def test_tiles_and_the_bits_of_a_row_do_not_depend_on_the_others_or_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_HALF", "amx")
    x, _, weight, bias = operands((60, 70, 700), torch.bfloat16)
    before, whole = torch.get_num_threads(), product(x, weight, bias)
    torch.set_num_threads(3)
    assert same(product(x, weight, bias), whole) and same(product(x[3:40], weight, bias), whole[3:40])
    torch.set_num_threads(before)
    x[1, 5], x[2, 6], x[3, 7] = float("nan"), float("inf"), torch.finfo(torch.float32).max
    found = product(x, torch.full((2, 700), 1 / 1024).bfloat16())
    assert not found[1:3].isfinite().any() and found[3].isfinite().all() and found[4:].isfinite().all()


def test_an_unknown_product_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_HALF", "fast")
    with pytest.raises(ConfigError, match="unknown product 'fast'"):
        module.in_tiles()
