"""The back end ``triton`` for NVIDIA GPUs; :mod:`lorakeet.kernels.int8.triton` is imported at the first product on one."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.kernels.cpu.gemm import LowRank
from lorakeet.kernels.int8 import blocked
from lorakeet.kernels.int8.format import split_scale


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether x is on a GPU that the Triton kernels run on."""
    if not x.is_cuda:
        return False
    from lorakeet.kernels.int8 import triton

    return triton.available(x.device)[0]


def unavailable() -> str | None:
    """Return the reason why this machine cannot run the kernels, or None."""
    from lorakeet.kernels.int8 import triton

    runs, how = triton.available(torch.device("cuda"))
    return None if runs else how


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, low_rank: LowRank | None) -> Tensor:
    """Compute h as :class:`lorakeet.kernels.int8.registry.Implementation` states it, with x rounded to int8.

    Args:
        x: [n, in].
        weight: int8 [out, in].
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
        bias: [out] or None.
        low_rank: u [n, r] and v [out, r], or None.
    """
    from lorakeet.kernels.int8 import triton

    row_scale, column_scale = split_scale(weight, scale)
    h = triton.product(blocked.scale_columns(x, column_scale), weight, row_scale, bias, low_rank)
    outliers = blocked.with_outliers(x, weight, scale, None)
    return h if outliers is None else blocked.add_low_rank(h, outliers)


def input_gradient(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute ∂x as :class:`lorakeet.kernels.int8.registry.Implementation` states it, with g rounded to int8.

    The gradient of a vocabulary, a weight without column scales, is not rounded: with one scale for each token its many small
    values would be lost.
    """
    from lorakeet.kernels.int8 import triton

    row_scale, column_scale = split_scale(weight, scale)
    if column_scale is None:
        return blocked.input_gradient(g, weight, scale)
    dx = triton.input_gradient(g, weight, row_scale).mul_(column_scale)
    return blocked.add_outlier_gradient(dx, g, weight, scale)
