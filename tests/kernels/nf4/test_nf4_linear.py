"""The 4-bit product in C and in plain torch: against the dequantized weight, for every shape, dtype and number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorakeet.errors import LorakeetError
from lorakeet.kernels.cpu import bindings, features
from lorakeet.kernels.nf4 import linear
from lorakeet.kernels.nf4.format import Nf4Tensors, dequantize, quantize
from lorakeet.kernels.nf4.reference import nf4_linear_reference

#: Tokens, output and input channels.
SHAPES = [
    *[(1, 1, 64), (3, 7, 64), (16, 33, 192), (17, 33, 192), (40, 130, 704), (25, 70, 1344), (90, 257, 128)],
    *[(4, 5, 96), (20, 7, 33), (0, 5, 64), (4, 0, 64), (4, 5, 0), (1, 3, 1)],
]
#: Ways to compute: all of C, C without AVX2's tiles, and no C.
WAYS = ["c", "no tiles", "torch"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setattr(bindings, "is_cpu_contiguous", lambda *_: False)
    if request.param == "no tiles":
        monkeypatch.setattr(features, "has", lambda _: False)
    yield request.param


def close(a: Tensor, b: Tensor, share: float = 2e-6) -> None:
    assert a.shape == b.shape
    if a.numel():
        assert float((a.double() - b).abs().max()) <= share * max(float(b.abs().max()), 1e-30)


@pytest.mark.parametrize("double", [True, False])
def test_products_equal_the_dequantized_weight(way: str, double: bool) -> None:
    for n, out, inner in SHAPES:
        torch.manual_seed(n + out)
        weight = quantize(torch.randn(out, inner), double)
        wide = dequantize(weight, torch.float64)
        x, g, bias = torch.randn(n, inner), torch.randn(n, out), torch.randn(out)
        u, v, w = torch.randn(n, 3), torch.randn(out, 3), torch.randn(inner, 3)
        close(linear.product(x, weight), x.double() @ wide.T)
        close(linear.product(x, weight, bias, (u, v)), x.double() @ wide.T + bias + (u @ v.T))
        close(linear.input_gradient(g, weight), g.double() @ wide)
        close(linear.input_gradient(g, weight, (u, w)), g.double() @ wide + (u @ w.T))


def test_c_multiplies_the_very_values(way: str) -> None:
    """The product with the identity has the bits of the dequantized weight, in both directions."""
    for double in (True, False):
        weight = quantize(torch.randn(70, 192) * torch.logspace(-3, 3, 192), double)
        wide = dequantize(weight)
        assert torch.equal(linear.product(torch.eye(192), weight).T, wide)
        assert torch.equal(linear.product(torch.eye(192)[:9], weight).T, wide[:, :9])
        assert torch.equal(linear.input_gradient(torch.eye(70), weight), wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_formats(dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(33, 128) / 11)
    x, g = torch.randn(20, 128, dtype=dtype), torch.randn(20, 33, dtype=dtype)
    share = 1e-12 if dtype == torch.float64 else 2e-2
    low_rank = torch.randn(20, 2), torch.randn(33, 2)
    h = linear.product(x, weight, None, low_rank)
    assert h.dtype == dtype
    close(h, x.double() @ dequantize(weight, dtype).double().T + low_rank[0].double() @ low_rank[1].T.double(), 2e-2)
    close(linear.input_gradient(g, weight), g.double() @ dequantize(weight, dtype).double(), share)


def test_autograd_is_that_of_the_reference() -> None:
    weight = quantize(torch.randn(33, 128) / 11)
    x, bias = torch.randn(2, 20, 128, requires_grad=True), torch.randn(33, requires_grad=True)
    grads = []
    for multiply in (linear.nf4_linear, nf4_linear_reference):
        (multiply(x, weight, bias) * torch.linspace(-1, 1, 33)).square().sum().backward()
        grads.append((x.grad, bias.grad))
        x.grad = bias.grad = None
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.nf4_linear(x, weight, bias).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(linear.nf4_linear(x, weight), linear.nf4_linear(x.detach(), weight))


def test_the_number_of_threads_does_not_matter() -> None:
    weight = quantize(torch.randn(300, 704))
    x, g = torch.randn(150, 704), torch.randn(150, 300)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append((linear.product(x, weight), linear.product(x[:5], weight), linear.input_gradient(g, weight)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize("rows", [3, 20])
def test_nan_and_infinity_stay_in_their_row(rows: int, way: str) -> None:
    weight = quantize(torch.randn(8, 128))
    for value in (float("nan"), float("inf")):
        x = torch.randn(rows, 128)
        x[1, 7] = value
        h = linear.product(x, weight)
        assert not h[1].isfinite().any() and h[[i for i in range(rows) if i != 1]].isfinite().all()


@pytest.mark.parametrize("rows", [3, 20])
def test_tensors_that_do_not_fit_are_an_error(rows: int) -> None:
    """C would read memory beyond them."""
    codes, absmax, nested, shape = quantize(torch.randn(8, 128))
    x, bias = torch.randn(rows, 128), torch.randn(8)
    wrong = [
        (x[:, :64].clone(), codes, absmax, nested, bias),
        (x, codes[:-1].clone(), absmax, nested, bias),
        (x, codes, absmax[:-1].clone(), nested, bias),
        (x, codes, absmax, nested[:200].clone(), bias),
        (x, codes, absmax, nested, bias[:7].clone()),
    ]
    for x, codes, absmax, nested, bias in wrong:
        with pytest.raises((RuntimeError, LorakeetError)):
            linear.product(x, Nf4Tensors(codes, absmax, nested, shape), bias)
