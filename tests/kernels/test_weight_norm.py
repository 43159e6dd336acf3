"""Norms of channels: products of the rank's width against the dense sum in fp64."""

from __future__ import annotations

import pytest
import torch

from lorakeet.kernels.weight_norm import channel_norms, channel_norms_reference


@pytest.mark.parametrize("channel_dim", [0, 1])
@pytest.mark.parametrize("step", [200, 7])
@pytest.mark.parametrize("shape", [(150, 90), (5, 3), (1, 1)])
def test_norms_of_blocks_are_those_of_the_dense_sum(shape: tuple[int, int], step: int, channel_dim: int) -> None:
    (out, width), r = shape, 4
    weight, a, b = torch.randn(out, width), torch.randn(r, width) * 0.3, torch.randn(out, r)
    stored = weight.T if channel_dim else weight
    found = channel_norms(stored.split(step), a, b, 0.7, channel_dim)
    wanted = channel_norms_reference(weight.double(), a.double(), b.double(), 0.7)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)
    exact = channel_norms([part.double() for part in stored.split(step)], a.double(), b.double(), 0.7, channel_dim)
    torch.testing.assert_close(exact, wanted, rtol=1e-12, atol=0)


def test_a_channel_of_zeros_can_be_divided_by_its_norm() -> None:
    norms = channel_norms([torch.zeros(2, 3)], torch.ones(1, 3), torch.tensor([[0.0], [2.0]]), 1.0)
    assert 0 < norms[0] < 1e-30 and norms[1] == pytest.approx(12**0.5)
