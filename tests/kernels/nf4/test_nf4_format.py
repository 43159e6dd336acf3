"""The NF4 format: rounding, packing and scales, as `bitsandbytes` has them."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.kernels.nf4.format import (
    BLOCK,
    MAX_ERROR,
    SCALE_BLOCK,
    VALUES,
    block_scales,
    dequantize,
    dequantize_at,
    nested_size,
    quantize,
    scale_table,
)

#: :func:`known_weight` by bitsandbytes 0.50.2: codes; codes of the scales, their mean and largest; SHA-256 of the values.
CODES = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d1"
    "7e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18e2a"
    "f4c16e18e3b05d17e29f3b05"
)
SCALE_CODES, MEAN, LARGEST = [164, 40, 255, 28], 0.751953125, 1.201171875
DEQUANTIZED = "b209eb1b91acccadbfda189c50c2bfd77eae381a2ac9a7ee76d79beec32d727c"
TABLE = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def known_weight() -> torch.Tensor:
    numbers = torch.arange(4 * 64).view(4, 64) * 37 % 101 - 50
    return numbers.float() / 64 * torch.tensor([[1.0], [0.3], [2.5], [0.05]])


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_codes_scales_and_values_are_those_of_bitsandbytes() -> None:
    made = quantize(known_weight())
    assert bytes(made.weight.flatten().tolist()).hex() == CODES and made.weight.shape == (128, 1)
    assert made.absmax.tolist() == SCALE_CODES and sha256(scale_table()) == TABLE
    assert made.nested[0] == MEAN and made.nested[257:].tolist() == [LARGEST]
    assert sha256(dequantize(made)) == DEQUANTIZED


def test_values_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, equation 4: means of neighbouring quantiles, 8 of them negative; 0 and both ends are exact."""
    offset = 0.9677083
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    positive = quantile(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat((positive, negative, torch.zeros(1))).sort().values
    assert torch.allclose(torch.tensor(VALUES), values / values.max(), atol=1e-6)
    assert VALUES[7] == 0 and VALUES[0] == -1 and VALUES[15] == 1


@given(st.integers(0, 9), st.integers(0, 150), st.floats(1e-6, 1e6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rounding_is_to_the_nearest_value(rows: int, columns: int, size: float, double: bool) -> None:
    """Every shape: empty ones, odd numbers of values, and rows that end within a block."""
    weight = torch.randn(rows, columns) * size
    made = quantize(weight, double)
    assert made.weight.shape == (-(-rows * columns // 2), 1) and made.shape == (rows, columns)
    assert made.nested is None or made.nested.shape == (nested_size(made.shape),)
    scales = block_scales(made)
    assert scales.shape == (-(-rows * columns // BLOCK),)
    steps = scales.repeat_interleave(BLOCK)[: weight.numel()].view_as(weight)
    allowed = (
        MAX_ERROR * steps.abs() + (scales - quantize(weight, False).absmax).abs().max() if rows * columns else steps
    )
    wide = dequantize(made)
    assert bool(((wide - weight).abs() <= allowed).all())
    assert torch.equal(dequantize(made, rows=slice(1, 3)), wide[1:3])
    at = torch.arange(rows).flip(0)
    assert torch.equal(dequantize_at(made, at), wide[at])
    if double and rows * columns:
        error = (scales - quantize(weight, False).absmax).abs().max()
        assert float(error) <= 0.0071 * float(made.nested[257:].max()) + 1e-30


@pytest.mark.parametrize("double", [True, False])
def test_zeros_stay_zeros(double: bool) -> None:
    weight = torch.randn(3, 2 * BLOCK)
    weight[1] = 0
    assert not dequantize(quantize(weight, double))[1].any()
    assert not dequantize(quantize(torch.zeros(4, 5), double)).any()


def test_bytes_a_weight() -> None:
    made = quantize(torch.randn(64, 64 * SCALE_BLOCK))
    stored = sum(tensor.nbytes for tensor in made[:3] if tensor is not None)
    assert 8 * stored / (64 * 64 * SCALE_BLOCK) == pytest.approx(4.127, abs=0.01)
