"""The 8-bit product of every back end of this machine against the exact one, forward and backward."""

from __future__ import annotations

import pytest
import torch

from helpers.int8_products import layer, unbalanced
from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.int8 import linear
from lorakeet.kernels.int8.format import dequantize, outlier_columns, quantize_rows, quantize_weight
from lorakeet.kernels.int8.reference import int8_linear_reference, rounded_groups
from lorakeet.kernels.lora_linear import lora_linear
from lorakeet.quant.int8 import Int8Weight


def test_an_activation_a_thousand_times_larger_meets_outlier_columns(back_end: str) -> None:
    """A text's first token has one in some layers: rounded, its error would exceed all other values of the product."""
    torch.manual_seed(0)
    weight = torch.randn(64, 200) / 14
    weight[7, 90] = 3.0
    x = torch.randn(20, 200)
    x[0, 90] = 3000.0
    h, truth = linear.int8_linear(x, *quantize_weight(weight)), x.double() @ weight.double().T
    error = (h - truth).norm(dim=1) / truth[1:].norm(dim=1).mean()
    assert float(error.max()) < 0.02
    plain = linear.int8_linear(x, *quantize_rows(weight)) - truth
    assert float(plain[0].norm() / truth[1:].norm(dim=1).mean()) > 1


@pytest.mark.parametrize("out", [48, 64])  # with outlier columns, and without
@pytest.mark.parametrize("rows", [0, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_with_column_scales(rows: int, dtype: torch.dtype, out: int, back_end: str) -> None:
    weight, scale = quantize_weight(unbalanced(out, 64))
    assert (outlier_columns(weight, scale) is None) == (out == 64)
    x = torch.randn(rows, 64) / torch.logspace(-1.5, 1.5, 64)
    x[:, [2, 60]] *= 50  # outliers, where the scales are small and where they are large
    x = x.to(dtype).requires_grad_()
    bias = torch.randn(out, dtype=dtype)
    a, b = torch.randn(4, 64) / 8, torch.randn(out, 4)
    for adapted in (False, True):
        h = (
            lora_linear(x, Int8Weight(weight, scale), bias, a, b, 0.5)
            if adapted
            else linear.int8_linear(x, weight, scale, bias)
        )
        wide, exact = dequantize(weight, scale, torch.float64), x.double()
        update = 0.5 * (exact @ a.double().T) @ b.double().T if adapted else 0
        truth = exact @ wide.T + bias.double() + update
        g = torch.randn(rows, out)
        dx, wanted = torch.autograd.grad(h, x, g.to(dtype))[0], torch.autograd.grad(truth, x, g.double())[0]
        assert h.dtype == dx.dtype == dtype and h.shape == truth.shape
        near = {torch.float32: 2e-4, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
        for mine, right, limit in ((h, truth, near), (dx, wanted, near if back_end in ("blocked", "pairs") else 0.02)):
            assert float((mine.double() - right).norm()) <= limit * float(right.norm())


@pytest.mark.parametrize("compiled", [True, False])
def test_the_gradient_of_a_vocabulary_is_unbiased(
    compiled: bool, back_end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax less one-hot target: a few large values and many small ones; the tokens' vectors have a common mean."""
    if not compiled:
        monkeypatch.setattr(bindings, "library", lambda: None)
    torch.manual_seed(0)
    vocabulary, tokens = 4000, 60
    weight, scale = quantize_rows(torch.randn(vocabulary, 48) + 2)
    p = (3 * torch.randn(tokens, vocabulary)).softmax(1)
    g = p - torch.nn.functional.one_hot(p.multinomial(1)[:, 0], vocabulary)
    exact = g.double() @ dequantize(weight, scale, torch.float64)
    error = linear.input_gradient(g, weight, scale).double() - exact
    alone = (rounded_groups(g * scale) @ weight.float()).double() - exact
    assert float(error.norm()) < 0.02 * float(exact.norm())
    assert float(error.sum(0).norm()) < 0.01 * float(exact.sum(0).norm()) < 0.2 * float(alone.sum(0).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_those_of_the_input(dtype: torch.dtype, back_end: str) -> None:
    x, weight, scale, bias = layer(24, 64, 48, dtype)
    for view in (x, x.view(2, 12, 64), x.view(2, 12, 64).transpose(0, 1), x[::2]):
        h = linear.int8_linear(view, weight, scale, bias)
        truth = int8_linear_reference(view.double(), weight, scale, bias.double())
        assert h.shape == truth.shape and h.dtype == dtype
        assert float((h.double() - truth).abs().max() / truth.abs().max()) < 0.03


def test_the_result_is_no_view_so_that_a_loss_may_overwrite_it() -> None:
    x, weight, scale, _ = layer(5, 7, 9)
    with torch.no_grad():
        assert not linear.int8_linear(x, weight, scale)._is_view()
    assert not linear.int8_linear(x.requires_grad_(), weight, scale)._is_view()
    a, b = torch.ones(2, x.shape[1], requires_grad=True), torch.ones(len(weight), 2, requires_grad=True)
    assert not lora_linear(x, Int8Weight(weight, scale), None, a, b, 0.5)._is_view()
