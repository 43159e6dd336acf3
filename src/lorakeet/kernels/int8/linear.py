"""A frozen linear layer in 8 bits: W₀ ≈ diag(s)·W₈·diag(c), W₈ int8 [out, in].

    h  = (x·diag(c))·W₈ᵀ·diag(s) + b            ∂x = (g·diag(s))·W₈·diag(c)

:mod:`lorakeet.kernels.int8.format` describes the weight, its scales and its outlier columns. Both directions read the
one stored
weight, and neither ever forms the whole of it in a wider format. The registry (:mod:`lorakeet.kernels.int8.registry`) chooses
one of five back ends:

- ``blocked``: a few rows of W₈ at a time become x's dtype, which holds every int8 exactly. They are multiplied while
  they are in
  the processor's cache. The scales multiply the result, or g before the product. Exact except for the weight's own rounding.
  For processors without 8-bit dot products, and for every other device.
  A few tokens are multiplied by the bytes as they are read (``gemv_w8.c``).
- ``pairs``: x is rounded to int16 with one scale for each token, and the weight's bytes are widened to int16 a few at a time.
  Adjacent pairs are multiplied and summed in int32 (``gemm_w8a16.c``). Rounding x to int16 loses less than bfloat16 would, so
  x is not split, and an instruction computes twice as many products as in fp32. Needs AVX2.
- ``vnni``: the same forward, and a backward that is twice as fast (``gemm_w8a8_grouped.c``). The gradient is rounded to int8
  with one scale for each token and 64 adjacent channels. 64 int8 products at a time are summed in int32, then scaled
  and added in
  fp32. The rounding error is noise in the gradient, far below that of a batch; forward it would be a share of the loss.
  For x86 processors with VNNI.
- ``amx``: the numbers of ``vnni``, to the bit, in tiles of AMX (``gemm_amx.c``). An int16 of x is two bytes, of which each
  is multiplied with the stored weight. For Intel processors from 2023 on.
- ``triton``: kernels for NVIDIA GPUs (:mod:`lorakeet.kernels.int8.triton`). x and the gradient are rounded to int8 with
  one scale
  for each token. Columns of x that int8 cannot represent are multiplied apart, in x's dtype. That is the split of LLM.int8()
  (Dettmers et al. 2022, arXiv:2208.07339, section 3.2), with outliers found by the tensor's own size, not by a fixed
  threshold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu.gemm import LowRank
from lorakeet.kernels.int8.blocked import add_low_rank
from lorakeet.kernels.int8.registry import best


def product(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """Compute h = (x·diag(c))·W₈ᵀ·diag(s) + b + u·vᵀ, the outlier columns included, without autograd.

    Args:
        x: [n, in], any floating dtype.
        weight: W₈, int8 [out, in].
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
        bias: b [out] or None.
        low_rank: u [n, r] and v [out, r], or None.

    Returns:
        [n, out] in x's dtype.
    """
    return best(x, weight).product(x, weight, scale, bias, low_rank)


def input_gradient(g: Tensor, weight: Tensor, scale: Tensor, low_rank: LowRank | None = None) -> Tensor:
    """Compute ∂x = (g·diag(s))·W₈·diag(c) + u·vᵀ, the outlier columns included, without autograd.

    A weight without column scales is a vocabulary's. For the LM head, g = softmax − onehot: a few large and many tiny entries
    that sum to 0. Rounding each on its own would zero the tiny ones and bias ∂x by the mean token vector, in every step. So
    their rounding error is carried forward, or nothing is rounded.

    Args:
        g: [n, out], any floating dtype.
        weight: W₈, int8 [out, in].
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
        low_rank: u [n, r] and v [in, r], or None.

    Returns:
        [n, in] in g's dtype.
    """
    dx = best(g, weight).input_gradient(g, weight, scale)
    return dx if low_rank is None else add_low_rank(dx, low_rank)


class _Int8Linear(torch.autograd.Function):
    """x [..., in] -> [..., out]; only the weight and its scale are saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight, scale)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        h = product(rows, weight, scale, bias)  # a view only where it is needed: a view may not be overwritten
        return h if x.dim() == 2 else h.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        g = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
        dx = (
            input_gradient(g, weight, scale).view(*grad.shape[:-1], weight.shape[1])
            if ctx.needs_input_grad[0]
            else None
        )
        return dx, None, None, g.sum(0) if ctx.needs_input_grad[3] else None


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a frozen linear layer in 8 bits.

    Args:
        x: [..., in], any floating dtype; under autocast it is cast to autocast's dtype.
        weight: int8 [out, in]; gets no gradient.
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    bias = None if bias is None else bias.to(x.dtype)
    if not torch.is_grad_enabled():
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        made = product(rows, weight, scale, bias)  # of a view the loss makes a copy
        return made if x.dim() == 2 else made.view(*x.shape[:-1], weight.shape[0])
    return _Int8Linear.apply(x, weight, scale, bias)
