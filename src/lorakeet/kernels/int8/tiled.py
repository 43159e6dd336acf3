"""The back ends ``pairs``, ``vnni`` and ``amx``: register tiles in C that multiply the weight with rounded activations.

``pairs`` rounds x and g to int16 with one scale for each token (``gemm_w8a16.c``). ``vnni`` has the same forward; backward it
rounds g to int8 with one scale for each token and 64 adjacent channels (``gemm_w8a8_grouped.c``). ``amx`` computes what
``vnni`` does, to the bit, in the tiles of AMX (``gemm_amx.c``). Tensors that C cannot read take the blocked product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lorakeet.kernels.cpu import features, gemm
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.gemm import LowRank
from lorakeet.kernels.int8 import blocked
from lorakeet.kernels.int8.format import quantize_rows, split_scale


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None,
    tiles: bool = False,
) -> Tensor:
    """Compute h as :class:`lorakeet.kernels.int8.registry.Implementation` states it, with x rounded to int16.

    Args:
        x: [n, in].
        weight: int8 [out, in].
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
        bias: [out] or None.
        low_rank: u [n, r] and v [out, r], or None.
        tiles: Multiply in tiles of AMX.
    """
    row_scale, column_scale = split_scale(weight, scale)
    wide, wide_bias = x.float().contiguous(), None if bias is None else bias.float()
    fits = features.has(Feature.AVX2) and x.shape[1] == weight.shape[1]
    if not (fits and blocked.readable(wide, weight, row_scale, column_scale, wide_bias)):
        return blocked.product(x, weight, scale, bias, low_rank)
    low_rank = blocked.with_outliers(x, weight, scale, low_rank)
    fused = low_rank if low_rank is not None and gemm.can_fuse_low_rank(*low_rank) else None
    h = gemm.gemm_w8a16(wide, weight, row_scale, column_scale, wide_bias, fused, tiles).to(x.dtype)
    return h if low_rank is None or fused is not None else blocked.add_low_rank(h, low_rank)


def pairs_input_gradient(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute ∂x as :class:`lorakeet.kernels.int8.registry.Implementation` states it, with g rounded to int16."""
    dx = _gradient_in_c(gemm.gemm_w8a16_dgrad, g, weight, scale)
    if dx is None:
        return blocked.input_gradient(g, weight, scale)
    return blocked.add_outlier_gradient(dx, g, weight, scale)


def vnni_input_gradient(g: Tensor, weight: Tensor, scale: Tensor, tiles: bool = False) -> Tensor:
    """Compute ∂x as :class:`lorakeet.kernels.int8.registry.Implementation` states it, with g rounded to int8.

    Where C cannot, torch's int8 product does it, with one scale for each token. That would bias the gradient of a vocabulary,
    which has no column scales and takes the blocked product.

    Args:
        g: [n, out].
        weight: int8 [out, in].
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
        tiles: Multiply in tiles of AMX.
    """
    dx = _gradient_in_c(partial(gemm.gemm_w8a8_grouped_dgrad, tiles=tiles), g, weight, scale)
    row_scale, column_scale = split_scale(weight, scale)
    if dx is None:
        if column_scale is None:
            return blocked.input_gradient(g, weight, scale)
        rounded, gradient_scale = quantize_rows(g.float().contiguous() * row_scale)
        dx = torch._int_mm(rounded, weight).float().mul_(gradient_scale.unsqueeze(1)).mul_(column_scale).to(g.dtype)
    return blocked.add_outlier_gradient(dx, g, weight, scale)


#: The same two in tiles of AMX.
amx_product, amx_input_gradient = partial(product, tiles=True), partial(vnni_input_gradient, tiles=True)


def _gradient_in_c(dgrad: Callable[..., Tensor], g: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
    """Return the gradient without outlier columns, or None if C cannot read the tensors.

    A weight without column scales is a vocabulary's: its gradient is rounded with error feedback.
    """
    row_scale, column_scale = split_scale(weight, scale)
    wide = g.float().contiguous()
    fits = features.has(Feature.AVX2) and g.shape[1] == weight.shape[0]
    if not (fits and blocked.readable(wide, weight, row_scale, column_scale)):
        return None
    return dgrad(wide, weight, row_scale, column_scale, error_feedback=column_scale is None).to(g.dtype)
