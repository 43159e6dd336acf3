"""The back ends ``pairs`` and ``vnni``: accuracy, overflow, NaN, and error feedback."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers.int8_products import gradient_like, layer, unlike_rows_of_gradient
from lorakeet.kernels.cpu import bindings, features, gemm
from lorakeet.kernels.cpu.abi import FEEDBACK
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.int8 import linear
from lorakeet.kernels.int8.format import dequantize
from lorakeet.kernels.int8.reference import vnni_gradient_reference

needs_avx2 = pytest.mark.skipif(not features.has(Feature.AVX2), reason="no AVX2, or no C compiler, on this machine")


def torch_product_is_exact() -> bool:
    """Whether torch adds products of int8 without saturation: with AVX2 alone pairs of them are added in 16 bits."""
    most = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most) == 64 * 127**2).all())


#: Tokens, in, out: odd sizes, deeper than one block of the sums (640), and more rows than one thread takes of few columns.
PAIRS = [
    (17, 1, 1),
    (18, 5, 3),
    (19, 16, 16),
    (24, 33, 31),
    (23, 640, 48),
    (37, 641, 50),
    (61, 1300, 700),
    (17, 2, 1400),
    (275, 40, 33),
]


@needs_avx2
@pytest.mark.parametrize("shape", PAIRS)
@pytest.mark.parametrize("biased", [False, True])
def test_pairs_is_near_the_exact_product(
    shape: tuple[int, int, int], biased: bool, use_back_end: Callable[[str], None]
) -> None:
    """Far nearer than bfloat16 would be, in both directions, also with outlier activations and rows of unlike size."""
    use_back_end("pairs")
    x, weight, scale, bias = layer(*shape)
    x *= torch.logspace(-12, 12, len(x)).unsqueeze(1)
    bias = bias * 1e-3 if biased else None
    wide = dequantize(weight, scale, torch.float64)
    h, dx = linear.product(x, weight, scale, bias), linear.input_gradient(gradient_like(x, weight), weight, scale)
    exact = x.double() @ wide.T + (0 if bias is None else bias)
    for mine, right in ((h, exact), (dx, gradient_like(x, weight).double() @ wide)):
        size = right.norm(dim=1, keepdim=True) / right.shape[1] ** 0.5 + 1e-30
        assert float(((mine.double() - right) / size).abs().max()) < 1e-3
    ordinary = exact.clone()
    x[:, 0] *= 100
    large = linear.product(x, weight, scale, bias)
    ordinary += (x.double()[:, :1] * 0.99) @ wide[:, :1].T
    size = ordinary.norm(dim=1, keepdim=True) / ordinary.shape[1] ** 0.5 + 1e-30
    assert float(((large.double() - ordinary) / size).abs().max()) < 4e-3


@needs_avx2
def test_the_sums_of_pairs_do_not_overflow(use_back_end: Callable[[str], None]) -> None:
    """All values have the largest magnitude and one sign, at depths around the size of a block."""
    use_back_end("pairs")
    for inner in (1, 15, 16, 17, 512, 625, 640, 641, 656, 1279, 1280, 1281, 4096):
        for sign in (1, -1):
            weight, scale = torch.full((20, inner), 127 * sign, dtype=torch.int8), torch.ones(20)
            x = torch.full((20, inner), 3.0)
            assert torch.allclose(
                linear.product(x, weight, scale), torch.full((20, 20), 381.0 * sign * inner), rtol=1e-4
            )
            g = torch.full((20, inner), 3.0)
            got = linear.input_gradient(g, weight.T.contiguous(), torch.ones(inner))
            assert torch.allclose(got, torch.full((20, 20), 381.0 * sign * inner), rtol=1e-4)


@needs_avx2
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pairs_keeps_nan_and_infinity_in_their_row(value: float, use_back_end: Callable[[str], None]) -> None:
    use_back_end("pairs")
    x, weight, scale, _ = layer(20, 40, 33)
    for where in (0, 7, 39):
        broken, g = x.clone(), torch.randn(20, 33)
        broken[4, where] = g[4, where % 33] = value
        others = [i for i in range(20) if i != 4]
        for got in (linear.product(broken, weight, scale), linear.input_gradient(g, weight, scale)):
            assert got[4].isnan().all() and got[others].isfinite().all()
    assert gemm.pack_a16(torch.zeros(2, 40), None)[1].tolist() == [1.0, 1.0]
    zeros = linear.product(torch.zeros(20, 40), weight, scale, torch.ones(33))
    assert bool((zeros == 1).all())


#: Tokens, in, out: odd sizes, around one group of 64 and one panel, and deeper than one block (2,048).
GROUPS = [
    (17, 1, 1),
    (18, 5, 3),
    (19, 16, 64),
    (24, 33, 65),
    (25, 32, 63),
    (61, 1300, 700),
    (37, 50, 2049),
    (130, 31, 4200),
]


@needs_avx2
@pytest.mark.parametrize("shape", GROUPS)
def test_vnni_gradient_equals_its_reference(shape: tuple[int, int, int], use_back_end: Callable[[str], None]) -> None:
    use_back_end("vnni")
    g, weight, scale = unlike_rows_of_gradient(*shape)
    dx, same = linear.input_gradient(g, weight, scale), vnni_gradient_reference(g, weight, scale)
    size = same.double().norm(dim=1, keepdim=True) / same.shape[1] ** 0.5 + 1e-30
    assert float(((dx.double() - same) / size).abs().max()) < 2e-5


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [s for s in GROUPS if min(s) > 16])
def test_vnni_gradient_is_near_the_exact_one(
    shape: tuple[int, int, int], compiled: bool, use_back_end: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row on its own, whatever the sizes of others; also without a compiler."""
    use_back_end("vnni")
    if not compiled and not torch_product_is_exact():
        pytest.skip("torch's own int8 product saturates without VNNI")
    if not compiled:
        monkeypatch.setattr(bindings, "library", lambda: None)
    g, weight, scale = unlike_rows_of_gradient(*shape)
    exact = g.double() @ dequantize(weight, scale, torch.float64)
    error = (linear.input_gradient(g, weight, scale) - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.mean()) < (0.015 if compiled else 0.03) and float(error.max()) < 0.08


@needs_avx2
@pytest.mark.parametrize("shape", GROUPS)
@pytest.mark.parametrize("name", ["pairs", "vnni"])
def test_rounding_errors_are_fed_back(
    name: str, shape: tuple[int, int, int], use_back_end: Callable[[str], None]
) -> None:
    """In the gradient of a vocabulary, a sum over a row is off by the errors of the last values only."""
    use_back_end(name)
    g, weight, scale = unlike_rows_of_gradient(*shape)
    row_scale = scale[: shape[2]]
    sums = linear.input_gradient(g, torch.ones_like(weight), row_scale).double()
    carried = (g * row_scale).double()
    step = carried.abs().amax(1) / (127 if name == "vnni" else 26000)
    wanted = carried.sum(1)
    assert bool(
        ((sums - wanted.unsqueeze(1)).abs().amax(1) <= 0.6 * FEEDBACK * step + 1e-5 * carried.norm(dim=1)).all()
    )
    if name == "vnni":  # near its reference: a value between two steps may be rounded up by one, down by the other
        dx, same = linear.input_gradient(g, weight, row_scale), vnni_gradient_reference(g, weight, row_scale)
        assert float(((dx.double() - same).norm(dim=1) / (same.double().norm(dim=1) + 1e-30)).median()) < 0.01


@needs_avx2
def test_large_values_of_a_gradient_cost_no_more_than_their_neighbours(use_back_end: Callable[[str], None]) -> None:
    """One in 640 channels is a thousand times the others: the other groups keep their accuracy."""
    use_back_end("vnni")
    g, weight, scale = unlike_rows_of_gradient(40, 70, 640)
    g /= g.norm(dim=1, keepdim=True)
    weight[320] = 0  # only the rounding error remains
    exact = g.double() @ dequantize(weight, scale, torch.float64)
    g[:, 320] *= 1000
    error = float((linear.input_gradient(g, weight, scale) - exact).norm() / exact.norm())
    assert 0.1 < error < 0.35  # the 63 neighbours are lost, a tenth of all channels


@needs_avx2
def test_the_sums_of_groups_do_not_overflow(use_back_end: Callable[[str], None]) -> None:
    use_back_end("vnni")
    for out in (1, 63, 64, 65, 2047, 2048, 2049, 4096):
        for sign in (1, -1):
            weight = torch.full((out, 20), 127 * sign, dtype=torch.int8)
            got = linear.input_gradient(torch.full((20, out), 3.0), weight, torch.ones(out))
            assert torch.allclose(got, torch.full((20, 20), 381.0 * sign * out), rtol=1e-5)


@needs_avx2
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_vnni_keeps_nan_and_infinity_in_their_row(value: float, use_back_end: Callable[[str], None]) -> None:
    use_back_end("vnni")
    _, weight, scale, _ = layer(20, 40, 133)
    for where in (0, 63, 64, 132):
        g = torch.randn(20, 133)
        g[4, where] = value
        g[5] = 0
        got = linear.input_gradient(g, weight, scale)
        assert got[4].isnan().all() and not got[5].any() and got[6:].isfinite().all() and got[:4].isfinite().all()
