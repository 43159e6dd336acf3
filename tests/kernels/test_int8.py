"""The 8-bit product: both back ends against their slow truths, forward and backward, on odd shapes and odd numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.kernels import int8
from lorakeet.kernels.lora_linear import lora_linear, lora_linear_reference

SHAPES = [(1, 5, 3), (0, 5, 3), (7, 1, 1), (33, 384, 700), (40, 257, 129), (3, 64, 1)]


@pytest.fixture(params=["blocked", "vnni"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(int8, "choose_backend", lambda: request.param)
    return request.param


def layer(rows: int, inner: int, out: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(rows + inner + out)
    weight, scale = int8.quantise_rows(torch.randn(out, inner) / inner**0.5)
    return torch.randn(rows, inner, dtype=dtype), weight, scale, torch.randn(out, dtype=dtype)


def close(a: torch.Tensor, b: torch.Tensor, share: float) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    if a.numel():
        assert float((a - b).abs().max()) <= share * float(b.abs().max())


@given(st.integers(0, 20), st.integers(1, 40), st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_rounding_is_within_half_a_step(rows: int, columns: int, size: float) -> None:
    x = torch.randn(rows, columns) * size
    rounded, scale = int8.quantise_rows(x)
    assert rounded.dtype == torch.int8 and scale.shape == (rows,) and bool((scale > 0).all())
    assert rounded.numel() == 0 or int(rounded.abs().max()) <= 127
    error = (int8.dequantise(rounded, scale) - x).abs()
    assert bool((error <= scale.unsqueeze(1) * 0.5001 + 1e-30).all())


def test_a_row_of_zeros_has_a_scale() -> None:
    rounded, scale = int8.quantise_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert rounded.tolist() == [[0, 0], [64, -127]] and scale.tolist() == pytest.approx([1.0, 2 / 127])


@pytest.mark.parametrize("shape", SHAPES)
def test_blocked_equals_the_dequantised_weight(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "choose_backend", lambda: "blocked")
    monkeypatch.setattr(int8, "BLOCK", 1000)
    x, weight, scale, bias = layer(*shape)
    x.requires_grad_()
    h, truth = int8.int8_linear(x, weight, scale, bias), int8.int8_linear_reference(x, weight, scale, bias)
    close(h, truth, 1e-5)
    g = torch.randn_like(truth)
    close(torch.autograd.grad(h, x, g)[0], torch.autograd.grad(truth, x, g)[0], 1e-5)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 16])
def test_vnni_equals_its_slow_truth_and_is_near_the_exact_product(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "choose_backend", lambda: "vnni")
    x, weight, scale, _ = layer(*shape)
    x[:, 3] *= 100  # an outlier feature
    x.requires_grad_()
    h = int8.int8_linear(x, weight, scale)
    assert 3 in int8.outlier_columns(x.detach()).tolist()
    close(h.detach(), int8.vnni_reference(x.detach(), weight, scale), 1e-5)
    truth = int8.int8_linear_reference(x, weight, scale)
    g = torch.randn_like(truth)
    dx, exact = torch.autograd.grad(h, x, g)[0], torch.autograd.grad(truth, x, g)[0]
    for mine, right in ((h, truth), (dx, exact)):
        assert float((mine - right).norm() / right.norm()) < 0.012


def test_without_the_split_an_outlier_column_costs_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scale, _ = layer(40, 256, 64)
    x[:, [5, 17, 200]] *= 100
    weight[:, [5, 17, 200]] = 0  # what is left of the product is the part that plain rounding loses
    truth = int8.int8_linear_reference(x, weight, scale)
    errors = {}
    for limit in (int8.OUTLIER, float("inf")):
        monkeypatch.setattr(int8, "OUTLIER", limit)
        errors[limit] = float((int8._vnni(x, weight, scale) - truth).norm() / truth.norm())
    assert errors[8.0] < 0.01 and errors[float("inf")] > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_those_of_the_input(dtype: torch.dtype, backend: str) -> None:
    x, weight, scale, bias = layer(24, 64, 48, dtype)
    for view in (x, x.view(2, 12, 64), x.view(2, 12, 64).transpose(0, 1), x[::2]):
        h = int8.int8_linear(view, weight, scale, bias)
        truth = int8.int8_linear_reference(view.double(), weight, scale, bias.double())
        assert h.shape == truth.shape and h.dtype == dtype
        assert float((h.double() - truth).abs().max() / truth.abs().max()) < 0.03


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(20, 40, 33), (1, 40, 33), (0, 40, 33)])
def test_with_a_low_rank_update(shape: tuple[int, int, int], p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "choose_backend", lambda: "blocked")
    x, weight, scale, bias = layer(*shape)
    a, b = torch.randn(4, shape[1]), torch.randn(shape[2], 4)
    dense = int8.dequantise(weight, scale)
    grads = []
    for w, s in ((weight, scale), (dense, None)):
        torch.manual_seed(7)  # the same dropout
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        h = lora_linear(leaves[0], w, bias, *leaves[1:], 2.0, p, scale=s)
        h.sum().mul(0.1).add((h**2).sum()).backward()
        grads.append([h.detach(), *(t.grad for t in leaves)])
    for mine, right in zip(*grads, strict=True):
        close(mine, right, 1e-4)
    if p == 0.0:
        close(grads[0][0], lora_linear_reference(x, weight, bias, a, b, 2.0, scale=scale), 1e-5)


def test_the_weight_is_never_wide_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "choose_backend", lambda: "blocked")
    x, weight, scale, _ = layer(4, 1024, 3000)
    blocks = int8._blocks(weight)
    assert len(blocks) > 8 and all(weight[rows].numel() <= 2 * int8.TILE * 1024 for rows in blocks)
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.shape[-1:] == (1024,):
                made.append(out.numel())
            return out

    with Watch():
        int8.input_gradient(int8.product(x, weight, scale), weight, scale)
    assert len(made) > 16 and max(made) <= 2 * int8.TILE * 1024 < weight.numel() / 10


def test_the_processor_decides_and_may_be_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    has = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    for asked, expected in ((None, "vnni" if has else "blocked"), ("vnni", "vnni"), ("blocked", "blocked")):
        int8.choose_backend.cache_clear()
        monkeypatch.delenv("LORAKEET_INT8", raising=False)
        if asked:
            monkeypatch.setenv("LORAKEET_INT8", asked)
        assert int8.choose_backend() == expected
    int8.choose_backend.cache_clear()
