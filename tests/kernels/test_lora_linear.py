"""The hand-written forward and backward against the equation in plain torch, and against a dense ΔW."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.kernels import lora_linear as kernel
from lorakeet.kernels.dropout import draw_seed, dropout, dropout_reference, keep_mask, keep_scale
from lorakeet.kernels.lora_linear import lora_linear, lora_linear_reference

SHAPES = [(3, 5, 7, 2), (1, 1, 1, 1), (0, 4, 3, 2), (17, 33, 9, 4), (2, 64, 31, 16)]


def operands(n, width, out, r, dtype=torch.float64, low=None, transposed=False, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g, dtype=torch.float64).to(dtype)
    w = torch.randn(out, width, generator=g, dtype=torch.float64).to(dtype)
    b = torch.randn(out, generator=g, dtype=torch.float64).to(dtype) if bias else None
    lora_a = torch.randn(r, width, generator=g, dtype=torch.float64).to(low or dtype)
    lora_b = torch.randn(out, r, generator=g, dtype=torch.float64).to(low or dtype)
    return x, (w.T.contiguous() if transposed else w), b, lora_a, lora_b


def gradients(function, x, w, b, lora_a, lora_b, *rest):
    leaves = [t.clone().requires_grad_() for t in (x, lora_a, lora_b) + (() if b is None else (b,))]
    y = function(leaves[0], w, leaves[3] if b is not None else None, leaves[1], leaves[2], *rest)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return y, torch.autograd.grad(y, leaves, upstream)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_backward_equal_the_equation(shape, transposed, bias, p, monkeypatch):
    x, w, b, lora_a, lora_b = operands(*shape, transposed=transposed, bias=bias)
    monkeypatch.setattr(kernel, "draw_seed", lambda: 1234)
    mask = keep_mask(1234, x.shape, p, x.device) if p else None
    fast, fast_grads = gradients(lora_linear, x, w, b, lora_a, lora_b, 0.7, p, transposed)
    slow, slow_grads = gradients(lora_linear_reference, x, w, b, lora_a, lora_b, 0.7, p, mask, transposed)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    for mine, true in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    r=st.integers(1, 5),
    contiguous=st.booleans(),
)
def test_any_leading_shape(lead, width, out, r, contiguous):
    x = torch.randn(*lead, width, dtype=torch.float64)
    if not contiguous and x.ndim > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    _, w, b, lora_a, lora_b = operands(1, width, out, r)
    fast, fast_grads = gradients(lora_linear, x, w, b, lora_a, lora_b, 2.0)
    slow, slow_grads = gradients(lora_linear_reference, x, w, b, lora_a, lora_b, 2.0)
    assert fast.shape == (*lead, out)
    torch.testing.assert_close(fast, slow)
    for mine, true in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_half_precision_base_with_fp32_adapter(p, monkeypatch):
    monkeypatch.setattr(kernel, "draw_seed", lambda: 7)
    x, w, b, lora_a, lora_b = operands(6, 16, 12, 4, dtype=torch.bfloat16, low=torch.float32)
    mask = keep_mask(7, x.shape, p, x.device) if p else None
    fast, fast_grads = gradients(lora_linear, x, w, b, lora_a, lora_b, 0.5, p)
    slow, slow_grads = gradients(lora_linear_reference, x, w, b, lora_a, lora_b, 0.5, p, mask)
    assert fast.dtype == torch.bfloat16
    assert [g.dtype for g in fast_grads] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    torch.testing.assert_close(fast, slow)
    for mine, true in zip(fast_grads[1:3], slow_grads[1:3], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fast_grads[0], slow_grads[0], rtol=3e-2, atol=3e-2)  # rounded once, not twice


def test_equals_a_dense_update():
    x, w, b, lora_a, lora_b = operands(5, 8, 6, 3)
    dense = F.linear(x, w + 0.25 * lora_b @ lora_a, b)
    torch.testing.assert_close(lora_linear(x, w, b, lora_a, lora_b, 0.25), dense, rtol=1e-12, atol=1e-12)


def test_numerical_gradient():
    x, w, b, lora_a, lora_b = operands(3, 4, 5, 2)
    leaves = [t.requires_grad_() for t in (x, b, lora_a, lora_b)]
    assert torch.autograd.gradcheck(lambda x, b, a, lb: lora_linear(x, w, b, a, lb, 1.5), leaves)


def test_stores_only_the_input_and_a_rank_wide_product(monkeypatch):
    x, w, b, lora_a, lora_b = operands(64, 32, 48, 4, dtype=torch.float32)
    lora_a.requires_grad_(), lora_b.requires_grad_()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        lora_linear(x.requires_grad_(), w, b, lora_a, lora_b, 1.0, 0.1)
    held = {t.data_ptr() for t in (x, w, lora_a, lora_b)}
    assert [tuple(t.shape) for t in stored if t.data_ptr() not in held] == [(64, 4)]  # u, and no mask, no copy


def test_no_gradient_for_an_input_that_needs_none():
    x, w, b, lora_a, lora_b = operands(3, 4, 5, 2)
    y = lora_linear(x, w, b, lora_a.requires_grad_(), lora_b.requires_grad_(), 1.0, 0.2)
    y.sum().backward()
    assert x.grad is None and lora_a.grad is not None and lora_b.grad is not None


def test_autocast_multiplies_in_its_dtype():
    x, w, b, lora_a, lora_b = operands(4, 8, 6, 2, dtype=torch.float32)
    lora_a.requires_grad_(), lora_b.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, w, b, lora_a, lora_b, 1.0)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert lora_a.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), lora_linear_reference(x, w, b, lora_a, lora_b, 1.0), rtol=5e-2, atol=0.2)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mask_drops_its_share_and_repeats(p):
    mask = keep_mask(3, (400, 500), p, torch.device("cpu"))
    share = 1 - mask.float().mean().item()
    assert abs(share - p) < 4 * (p * (1 - p) / 200_000) ** 0.5 + 2**-16
    assert torch.equal(mask, keep_mask(3, (400, 500), p, torch.device("cpu")))
    assert not torch.equal(mask, keep_mask(4, (400, 500), p, torch.device("cpu")))
    # neighbours are independent: all four draws of a 64-bit word drop alike
    lanes = (~mask).float().reshape(-1, 4).mean(0)
    assert (lanes - p).abs().max() < 5 * (p * (1 - p) / 50_000) ** 0.5


def test_dropout_keeps_the_expectation_and_its_gradient_uses_the_same_mask():
    x = torch.ones(1000, 300, requires_grad=True)
    y = dropout(x, 0.05, training=True)
    assert abs(y.mean().item() - 1) < 0.005
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert dropout(x, 0.05, training=False) is x


def test_nearly_everything_dropped_stays_finite():
    mask = keep_mask(0, (100, 100), 0.999999, torch.device("cpu"))
    assert dropout_reference(torch.ones(100, 100), mask, 0.999999).isfinite().all()
    assert keep_scale(0.999999) == 65536


def test_seed_comes_from_the_default_generator():
    torch.manual_seed(5)
    first = draw_seed()
    torch.manual_seed(5)
    assert draw_seed() == first != draw_seed()
