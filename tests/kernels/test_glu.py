"""The hand-written gated activation against the equation in plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.glu import gated, gated_reference

NEAR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
KINDS = ["silu", "gelu", "gelu_tanh"]


def operands(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * 2).to(dtype) for _ in range(2)]


def outcome(function, gate, up, kind, needed=(True, True)):
    leaves = [t.clone().requires_grad_(need) for t, need in zip((gate, up), needed, strict=True)]
    h = function(*leaves, kind)
    upstream = torch.randn(h.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(h.dtype)
    before = upstream.clone()
    made = torch.autograd.grad(h, [leaf for leaf in leaves if leaf.requires_grad], upstream)
    assert torch.equal(upstream, before) and torch.equal(leaves[0], gate) and torch.equal(leaves[1], up)
    return h, *made


def assert_same(found, expected, near):
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == true.dtype
        torch.testing.assert_close(mine, true, rtol=near, atol=near)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 33), (0, 4), (17, 64)])
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_equal_the_equation(shape, dtype, kind):
    gate, up = operands(shape, dtype)
    assert_same(outcome(gated, gate, up, kind), outcome(gated_reference, gate, up, kind), NEAR[dtype])


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_input_alone_may_learn(needed, kind):
    gate, up = operands((5, 9), torch.float32)
    assert_same(outcome(gated, gate, up, kind, needed), outcome(gated_reference, gate, up, kind, needed), 2e-6)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 6), min_size=2, max_size=4), kind=st.sampled_from(KINDS), part=st.booleans())
def test_any_shape_and_layout(shape, kind, part):
    gate, up = operands((*shape[:-1], 2 * shape[-1]), torch.float64)
    both = gate.split(shape[-1], dim=-1) if part else (gate.transpose(0, 1), up.transpose(0, 1))
    assert_same(outcome(gated, *both, kind), outcome(gated_reference, *both, kind), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_numerical_gradient(kind):
    gate, up = (t.requires_grad_() for t in operands((3, 4), torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: gated(a, b, kind), (gate, up))


def test_large_values():
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    for kind in KINDS:
        found, expected = (outcome(f, gate, torch.ones(5), kind) for f in (gated, gated_reference))
        assert all(t.isfinite().all() for t in found)
        assert_same(found, expected, 1e-6)


def test_different_dtypes_and_shapes_are_the_references_business():
    gate, up = operands((3, 4), torch.float32)
    assert gated(gate.bfloat16(), up, "silu").dtype == torch.float32
    assert torch.equal(gated(gate, up[:1], "silu"), gated_reference(gate, up[:1], "silu"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_inputs_are_stored_and_nothing_else(kind):
    gate, up = (t.requires_grad_() for t in operands((64, 96), torch.float32))

    def stored(function):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            function(gate, up, kind)
        return kept

    assert set(stored(gated)) == {gate.data_ptr(), up.data_ptr()}
    assert len(stored(gated_reference)) == 3


@pytest.mark.parametrize("fewer", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_kept_in_fewer_bits(kind, dtype, fewer):
    gate, up = operands((5, 33), dtype)

    def keeping(keep):
        return outcome(lambda a, b, f: gated(a, b, f, keep), gate, up, kind)

    output, *gradients = keeping(fewer)
    assert torch.equal(output, gated(gate, up, kind))
    narrow = [t.to(fewer).to(dtype) for t in (gate, up)]  # the gradient is that at the rounded values
    _, *true = outcome(gated_reference, *narrow, kind)
    assert_same(gradients, true, NEAR[dtype])
    leaf = gated(gate.requires_grad_(), up, kind, fewer)
    assert {t.dtype for t in leaf.grad_fn.saved_tensors} == {fewer}


@pytest.mark.skipif(bindings.library() is None, reason="nothing is compiled on this machine")
def test_bfloat16_is_rounded_as_torch_does() -> None:
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-40, 3.3895314e38, 1.00390625, 1.01171875, -0.0])
    x = torch.cat((odd, torch.randn(3000) * torch.randn(3000).exp()))
    for kind in (0, 1):
        _, gate, up = bindings.gated(x, -x, kind, narrow=True)
        torch.testing.assert_close((gate, up), (x.bfloat16(), -x.bfloat16()), rtol=0, atol=0, equal_nan=True)
