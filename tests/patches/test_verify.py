"""Verification of patches: once per layer type, with a warning where a patch differs, and without drawing random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakeet.patches.verify import Verifier, is_close, same_output_and_gradient


def test_a_layer_type_is_compared_once(caplog: pytest.LogCaptureFixture) -> None:
    verifier, compared = Verifier(), []
    before = torch.get_rng_state()

    def compare() -> bool:
        compared.append(torch.rand(1))
        return False

    for _ in range(3):
        assert not verifier.agrees("norm", nn.LayerNorm(2), compare)
    assert verifier.agrees("linear", nn.Linear(1, 1), lambda: True)
    assert len(compared) == 1
    assert caplog.messages == ["LayerNorm does not match its patch and stays unpatched"]
    torch.set_rng_state(before)
    assert compared[0] == torch.rand(1)  # as if nothing had been drawn in between


def test_tensors_are_close_within_a_share_of_the_largest_value() -> None:
    own = torch.tensor([100.0, 0.0])
    assert is_close(own, torch.tensor([100.0, 0.9]), tolerance=0.01)
    assert not is_close(own, torch.tensor([100.0, 1.1]), tolerance=0.01)
    assert is_close(own, torch.tensor([101.9, 0.9]), tolerance=0.01, relative=0.01)
    assert not is_close(own, own.double(), tolerance=1.0)
    assert not is_close(own, torch.tensor([float("nan"), 0.0]), tolerance=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_compared(dtype: torch.dtype) -> None:
    x = torch.linspace(-2, 2, 9, dtype=dtype)

    def other_gradient(leaf: Tensor) -> Tensor:
        y = leaf.square()
        return y.detach() + leaf - leaf.detach()

    assert same_output_and_gradient(torch.square, lambda leaf: leaf * leaf, x, 8)
    assert not same_output_and_gradient(torch.square, other_gradient, x, 8)
    assert not same_output_and_gradient(torch.square, lambda leaf: leaf.square() * 1.5, x, 8)


def test_dropout_inside_of_both_forwards_draws_the_same_numbers() -> None:
    def forward(leaf: Tensor) -> Tensor:
        return nn.functional.dropout(leaf, 0.5)

    assert same_output_and_gradient(forward, forward, torch.ones(64), 0)
