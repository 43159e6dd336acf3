"""A frozen linear layer whose weight is stored in 16 bits, and computed as if it were fp32.

    h  = x·Wᵀ + b + u·vᵀ          ∂x = g·W + u·vᵀ

bf16 and fp16 are numbers of fp32 too, so nothing is rounded but the sums. The products are those of
:mod:`lorakeet.kernels.frozen_linear` with the widened weight, to the bit wherever that multiplies by ``gemm_f32.c``: in all
of training and its evaluation on processors with AVX2.

- Many tokens, or a large product of few in a fixed order: a panel of the weight at a time is widened into the cache, and
  multiplied there (``gemm_half.c``).
- Few tokens: the weight is widened in registers, so that half as many bytes are read (``gemv_half.c``).
- Elsewhere the whole weight is widened for the call.

``LORAKEET_HALF=amx`` multiplies many tokens by a bf16 weight in tiles of AMX (``gemm_half_amx.c``). It rounds x to 16 bits,
so it is no default. Where the processor has no tiles, they are emulated, for tests.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.errors import ConfigError
from lorakeet.kernels import fixed_order
from lorakeet.kernels.cpu import bindings, features, half
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.gemm import GEMV_TOKENS, LowRank
from lorakeet.kernels.cpu.ordered_product import add_low_rank_
from lorakeet.kernels.frozen_linear import linear_out

#: Values of ``LORAKEET_HALF``: the product of fp32, to the bit, and that in tiles of AMX.
EXACT, TILES = "exact", "amx"
#: Number formats of 16 bits.
HALF = (torch.bfloat16, torch.float16)


def half_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the reference: plain torch with the widened weight, differentiated by autograd."""
    return F.linear(x, weight.to(x.dtype), bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, low_rank: LowRank | None = None) -> Tensor:
    """Compute h = x·Wᵀ + b + u·vᵀ without autograd.

    Args:
        x: [n, in], any floating dtype.
        weight: W [out, in], bf16 or fp16.
        bias: b [out] or None.
        low_rank: u [n, r] and v [out, r], or None.

    Returns:
        [n, out] in x's dtype.
    """
    return _plus_low_rank(_product(x, weight.T, bias), low_rank)


def input_gradient(g: Tensor, weight: Tensor, low_rank: LowRank | None = None) -> Tensor:
    """Compute ∂x = g·W + u·vᵀ without autograd.

    Args:
        g: [n, out], any floating dtype.
        weight: W [out, in], bf16 or fp16.
        low_rank: u [n, r] and v [in, r], or None.

    Returns:
        [n, in] in g's dtype.
    """
    return _plus_low_rank(_product(g, weight, None), low_rank)


def _product(rows: Tensor, m: Tensor, bias: Tensor | None) -> Tensor:
    """Compute rows·m + bias, for rows [n, k] and m [k, columns] in 16 bits."""
    if not _is_readable(rows, m, bias):
        return linear_out(rows, m.to(rows.dtype), bias)
    few, ordered = len(rows) <= GEMV_TOKENS, fixed_order.is_active()
    if not few and m.dtype == torch.bfloat16 and in_tiles():
        return half.gemm_half_amx(rows.contiguous(), m, bias)
    if not few or (ordered and rows.numel() * m.shape[1] > fixed_order.SMALL):
        return half.gemm_half(rows.contiguous(), m, bias)
    if ordered or m.is_contiguous():
        return linear_out(rows, m.to(rows.dtype), bias)
    return half.gemv_half(rows.contiguous(), m.T, bias)


def in_tiles() -> bool:
    """Whether a weight in bf16 is multiplied in tiles of AMX, as ``LORAKEET_HALF=amx`` asks for.

    Raises:
        ConfigError: The variable names no product, or one that does not run here.
    """
    asked = os.environ.get("LORAKEET_HALF") or EXACT
    if asked not in (EXACT, TILES):
        raise ConfigError(f"LORAKEET_HALF: unknown product {asked!r}", f"name one of: {EXACT}, {TILES}")
    if asked == TILES and Feature.AMX not in features.runnable():
        raise ConfigError(
            f"LORAKEET_HALF: {TILES!r} cannot run here: this processor, or the compiled library, has no amx",
            f"name one of: {EXACT}",
        )
    return asked == TILES


def _is_readable(rows: Tensor, m: Tensor, bias: Tensor | None) -> bool:
    """Whether C can multiply these: fp32 rows and a bias, and a weight in 16 bits that lies contiguous."""
    if not (features.has(Feature.AVX2) and bindings.is_plain_fp32(rows) and m.dtype in HALF and m.numel()):
        return False
    side = m if m.is_contiguous() else m.T
    fits = rows.shape[1] == m.shape[0] and bindings.is_fp32_vector(m.shape[1], bias)
    return fits and bindings.is_cpu_contiguous(side) and (bias is None or bindings.is_cpu_contiguous(bias))


def _plus_low_rank(h: Tensor, low_rank: LowRank | None) -> Tensor:
    """Return h + u·vᵀ: in place where the dtypes allow it, else rounded once."""
    if low_rank is None:
        return h
    u, v = low_rank
    if h.dtype == v.dtype:
        return add_low_rank_(h, u, v.T)
    return torch.addmm(h.to(v.dtype), u, v.T).to(h.dtype)


class _HalfLinear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None -> [..., out]; only the weight is saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        h = product(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias)
        return h.resize_(*x.shape[:-1], len(weight))  # not a view: a view may not be overwritten

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        g, dx = grad.reshape(grad.shape[:-1].numel(), len(weight)), None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(g, weight).resize_(*grad.shape[:-1], weight.shape[1])
        return dx, None, g.sum(0) if ctx.needs_input_grad[2] else None


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a frozen linear layer whose weight is stored in 16 bits.

    Args:
        x: [..., in], any floating dtype; under autocast it is cast to autocast's dtype.
        weight: [out, in], bf16 or fp16; gets no gradient.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    bias = None if bias is None else bias.to(x.dtype)
    h: Tensor = _HalfLinear.apply(x, weight, bias)
    return h
