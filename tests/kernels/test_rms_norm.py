"""The hand-written norm against the equation in plain torch, in every dtype and on awkward shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.kernels.rms_norm import rms_norm, rms_norm_reference

NEAR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def outcome(function, x, weight, one_more, learns):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_(learns)
    y = function(x, weight, 1e-5, one_more)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, [x, weight] if learns else [x], upstream)


def operands(shape, dtype, weight_dtype=None):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 0.5
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(weight_dtype or dtype)


def assert_same(found, expected, near):
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == true.dtype and mine.shape == true.shape
        largest = float(true.detach().abs().max()) if true.numel() else 0.0
        torch.testing.assert_close(
            mine, true, rtol=near, atol=near * max(largest, 1.0)
        )  # of one column: ∂x is almost 0


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 33), (1, 2, 3, 8), (0, 4), (2, 0, 4), (5, 1), (13, 576)])
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("one_more", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_forward_and_backward_equal_the_equation(shape, dtype, one_more, learns):
    x, weight = operands(shape, dtype)
    assert_same(*(outcome(f, x, weight, one_more, learns) for f in (rms_norm, rms_norm_reference)), NEAR[dtype])


@pytest.mark.parametrize("one_more", [False, True])
def test_half_precision_under_a_wider_weight(one_more):
    x, weight = operands((6, 40), torch.bfloat16, torch.float32)
    assert_same(*(outcome(f, x, weight, one_more, True) for f in (rms_norm, rms_norm_reference)), NEAR[torch.bfloat16])


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), strange=st.booleans(), one_more=st.booleans())
def test_any_shape_and_layout(shape, strange, one_more):
    x, weight = operands(tuple(shape), torch.float64)
    if strange and x.ndim > 1:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    assert_same(*(outcome(f, x, weight, one_more, True) for f in (rms_norm, rms_norm_reference)), 1e-12)


@pytest.mark.parametrize("one_more", [False, True])
def test_numerical_gradient(one_more):
    x, weight = (t.requires_grad_() for t in operands((3, 4), torch.float64))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, one_more), (x, weight))


def test_rows_of_zeros_and_large_rows():
    x = torch.zeros(4, 8)
    x[1], x[2] = 1e18, -1e-6
    weight = torch.ones(8)
    found, expected = (outcome(f, x, weight, False, True) for f in (rms_norm, rms_norm_reference))
    assert found[0].isfinite().all() and not found[0][0].any()
    assert_same(found, expected, 1e-5)


def stored(function, dtype, learns):
    """Bytes of what autograd keeps beyond x and the weight."""
    x, weight = operands((64, 96), dtype)
    x.requires_grad_()
    weight.requires_grad_(learns)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        function(x, weight, 1e-5)
    return sum(t.nbytes for pointer, t in kept.items() if pointer not in (x.data_ptr(), weight.data_ptr()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [False, True])
def test_one_number_a_row_is_stored(dtype, learns):
    assert stored(rms_norm, dtype, learns) == 64 * 4
    assert stored(rms_norm_reference, dtype, learns) >= (64 * 96 * 2 if dtype == torch.bfloat16 or learns else 64 * 4)


def test_a_frozen_weight_gets_no_gradient():
    x, weight = operands((3, 5), torch.float32)
    x.requires_grad_()
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is None and x.grad is not None
    learned = weight.clone().requires_grad_()
    rms_norm(x.detach(), learned, 1e-5).sum().backward()
    assert learned.grad is not None
