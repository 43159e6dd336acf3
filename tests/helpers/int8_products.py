"""Weights, gradients and comparisons for the tests of the 8-bit products."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.kernels.int8.format import quantize_rows, quantize_weight


def layer(rows: int, inner: int, out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return x [rows, in], a weight without column scales, its scale and a bias."""
    torch.manual_seed(rows + inner + out)
    weight, scale = quantize_rows(torch.randn(out, inner) / inner**0.5)
    return torch.randn(rows, inner, dtype=dtype), weight, scale, torch.randn(out, dtype=dtype)


def unbalanced(out: int, inner: int) -> Tensor:
    """Return a weight whose columns differ in size, as those of real models do."""
    torch.manual_seed(out * inner)
    return torch.randn(out, inner) * torch.logspace(-1.5, 1.5, inner) * torch.rand(out, 1).add(0.5)


def unlike_rows_of_gradient(rows: int, inner: int, out: int) -> tuple[Tensor, ...]:
    """Return a gradient whose rows differ in size, a weight and its scale."""
    torch.manual_seed(rows * inner + out)
    weight, scale = quantize_weight(unbalanced(out, inner))
    return torch.randn(rows, out) * torch.logspace(-12, 12, rows).unsqueeze(1), weight, scale


def gradient_like(x: Tensor, weight: Tensor) -> Tensor:
    """Return a gradient [n, out] whose rows have the sizes of x's."""
    torch.manual_seed(3)
    return torch.randn(len(x), len(weight)) * x.norm(dim=1, keepdim=True)


def assert_close(a: Tensor, b: Tensor, share: float) -> None:
    """Assert equal shapes and dtypes, and differences of at most a share of the largest value."""
    assert a.shape == b.shape and a.dtype == b.dtype
    if a.numel():
        assert float((a - b).abs().max()) <= share * float(b.abs().max())
