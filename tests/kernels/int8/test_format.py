"""The int8 format: rounding, balanced columns and outlier columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.int8_products import unbalanced
from lorakeet.kernels.int8.format import (
    balance_columns,
    dequantize,
    outlier_columns,
    quantize_rows,
    quantize_weight,
    rounding_steps,
    split_scale,
)


@given(st.integers(0, 20), st.integers(1, 40), st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_rounding_is_within_half_a_step(rows: int, columns: int, size: float) -> None:
    x = torch.randn(rows, columns) * size
    rounded, scale = quantize_rows(x)
    assert rounded.dtype == torch.int8 and scale.shape == (rows,) and bool((scale > 0).all())
    assert rounded.numel() == 0 or int(rounded.abs().max()) <= 127
    error = (dequantize(rounded, scale) - x).abs()
    assert bool((error <= scale.unsqueeze(1) * 0.5001 + 1e-30).all())


def test_a_row_of_zeros_has_a_scale() -> None:
    rounded, scale = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert rounded.tolist() == [[0, 0], [64, -127]] and scale.tolist() == pytest.approx([1.0, 2 / 127])


def test_balanced_columns_are_rounded_finely() -> None:
    """Columns of small values meet large activations, where the step of the large columns would cost much accuracy."""
    weight = unbalanced(96, 96)
    rounded, scale = quantize_weight(weight)
    assert rounded.dtype == torch.int8 and scale.shape == (96 + 96,)
    column_scale = scale[96:]
    assert torch.equal(column_scale, column_scale.log2().round().exp2())
    assert float(column_scale.max() / column_scale.min()) > 100
    assert bool(((dequantize(rounded, scale) - weight).abs() <= 0.501 * rounding_steps(rounded, scale)).all())
    x = torch.randn(200, 96) / torch.logspace(-1.5, 1.5, 96)
    errors = [float((x @ (dequantize(*r) - weight).T).norm()) for r in ((rounded, scale), quantize_rows(weight))]
    assert errors[0] < errors[1] / 5


def test_columns_are_balanced_although_rows_differ() -> None:
    """A few large rows do not decide the size of a column."""
    weight = unbalanced(64, 96)
    weight[:8] = 100 * weight[:8].flip(1)
    balanced = weight / balance_columns(weight)
    balanced /= balanced.square().mean(1, keepdim=True).sqrt()
    spread = balanced.square().mean(0).sqrt()
    assert float(spread.max() / spread.min()) < 4  # powers of two leave a factor of two, chance the rest


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (0, 5), (5, 0), (3, 4)])
def test_balanced_columns_of_odd_weights(shape: tuple[int, int]) -> None:
    for weight in (torch.zeros(shape), torch.randn(shape) * 1e-20, torch.randn(shape) * 1e20):
        if min(shape) > 1:
            weight[:, 0] = 0  # a column of zeros
            weight[1] = 0  # and a row
        rounded, scale = quantize_weight(weight)
        row_scale, column_scale = split_scale(rounded, scale)
        outliers = outlier_columns(rounded, scale)
        assert scale.isfinite().all() and bool((row_scale > 0).all()) and column_scale is not None
        assert (column_scale == 0).nonzero()[:, 0].tolist() == ([] if outliers is None else outliers[0].tolist())
        assert bool(
            ((dequantize(rounded, scale) - weight).abs() <= 0.501 * row_scale.unsqueeze(1) * column_scale).all()
        )


@pytest.mark.parametrize("shape", [(4, 9), (40, 41), (1, 3)])
def test_columns_of_the_largest_values_stay_fp32_where_a_weight_narrows(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).clamp_(-2, 2)
    weight[0, 1], weight[-1, 2] = 5, -4
    rounded, scale = quantize_weight(weight)
    outliers = outlier_columns(rounded, scale)
    assert outliers is not None and outliers[0].tolist() == [1, 2] and torch.equal(outliers[1], weight[:, 1:3].T)
    assert torch.equal(dequantize(rounded, scale)[:, 1:3], weight[:, 1:3]) and not rounded[:, 1:3].any()
    rest = weight.abs()
    rest[:, 1:3] = 0
    assert (
        float(rounding_steps(rounded, scale).max()) <= 2 * float(rest.max()) / 127
    )  # steps of the rest, not of the outlier 5
    for other in ((9, 4), (4, 4), (1, 2), (0, 5)):
        assert outlier_columns(*quantize_weight(torch.randn(other))) is None
