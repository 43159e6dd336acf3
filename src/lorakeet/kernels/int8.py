"""A frozen weight in 8 bits: W₀ ≈ diag(s)·W₈, W₈ int8 [out, in], one scale s for each output channel.

    h  = x·W₈ᵀ·diag(s) + b            ∂x = (g·diag(s))·W₈

Both directions read the one stored weight, and neither ever makes the whole of it in a wider format. Three back ends:

- ``blocked``: a few rows of W₈ at a time become x's dtype (which holds every int8 exactly), small enough to stay in the
  processor's cache, and are multiplied there; the scales are put on what comes out, or on g before it goes in. Exact but
  for the weight's own rounding. For processors without 8-bit dot products, and everywhere else.
  One or few tokens are multiplied by the bytes as they are read (:mod:`lorakeet.kernels.native`).
- ``vnni``: x is rounded to int8 with one scale for each token, all but the columns that int8 cannot carry, and multiplied
  as int8; what was left out is added in x's dtype (the split of LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339,
  section 3.2, with outliers known by the tensor's own size and not by a fixed threshold). The gradient is rounded for each
  token with the weight's scales folded in. For x86 processors with VNNI or AMX.
- ``triton``: the same on NVIDIA GPUs, in kernels of our own (:mod:`lorakeet.kernels.int8_triton`).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels import native

Backend = Literal["blocked", "vnni", "triton"]

#: Values of the weight that are made wide at once: 1 MB in fp32.
BLOCK = 1 << 18
#: Output channels in a block: a multiple of this, for the tiles of matrix products, and at least twice as many.
TILE = 128
#: A column of x with a value above so many times x's root mean square is multiplied in full precision.
OUTLIER = 8.0
#: So many tokens, or fewer, are multiplied while the weight is read.
FEW = 16
#: More columns than this share are not split off: then the rows themselves are large, and their scales follow.
MOST_OUTLIERS = 1 / 16


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 by its largest value.

    Args:
        x: [rows, columns], any floating dtype, finite.

    Returns:
        int8 [rows, columns] in −127…127, and fp32 [rows] with x ≈ scale·int8; a row of zeros has the scale 1.
    """
    largest = x.abs().amax(1, keepdim=True).float() if x.shape[1] else x.new_zeros(len(x), 1, dtype=torch.float32)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)  # NaN stays NaN
    return (x / scale.to(x.dtype) if x.dtype == torch.float32 else x.float() / scale).round_().to(torch.int8), scale[
        :, 0
    ]


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole weight, [out, in], in ``dtype``: for checks and for merging, never for a product."""
    return (weight.float() * scale.unsqueeze(1)).to(dtype)


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The slow truth of ``blocked``: multiply by the dequantised weight."""
    return F.linear(x, dequantise(weight, scale, x.dtype), bias)


def vnni_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The slow truth of ``vnni``'s forward for x [n, in]: rounded activations, outlier columns apart, all in fp64."""
    columns = outlier_columns(x)
    inner = x.clone()
    inner[:, columns] = 0
    rounded, row_scale = quantise_rows(inner)
    wide = dequantise(weight, scale, torch.float64)
    h = (rounded.double() * row_scale.double().unsqueeze(1)) @ wide.T
    return (h + x[:, columns].double() @ wide[:, columns].T).to(x.dtype)


@cache
def choose_backend() -> Literal["blocked", "vnni"]:
    """What this processor is best at; ``LORAKEET_INT8=blocked`` or ``vnni`` overrules it."""
    asked = os.environ.get("LORAKEET_INT8")
    if asked in ("blocked", "vnni"):
        return asked  # type: ignore[return-value]
    return "vnni" if torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported() else "blocked"


def backend_for(x: Tensor) -> Backend:
    """The back end for a product with x: few tokens read the weight once and gain nothing from being rounded."""
    if x.device.type == "cuda":
        return backend_on(x.device)
    return choose_backend() if x.device.type == "cpu" and x.shape[0] > FEW else "blocked"


@cache
def backend_on(device: torch.device) -> Backend:
    """What multiplies on a device; few tokens may be multiplied otherwise."""
    if device.type == "cpu":
        return choose_backend()
    from lorakeet.kernels import int8_triton

    return "triton" if os.environ.get("LORAKEET_INT8") != "blocked" and int8_triton.available(device)[0] else "blocked"


# -- products, without autograd ---------------------------------------------------------------------------------------


def product(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, low: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """h = x·W₈ᵀ·diag(s) + b + u·vᵀ for x [n, in] and low = (u [n, r], v [out, r]) or None; [n, out] in x's dtype."""
    if backend_for(x) == "triton":
        from lorakeet.kernels import int8_triton

        return int8_triton.product(x, weight, scale, bias, low)
    h = _product(x, weight, scale, bias)
    return h if low is None else _plus(h, low)


def _product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    few = x.shape[0] <= FEW and x.dtype == torch.float32  # len() of a tensor costs as much as a small product
    few = few and weight.dtype == torch.int8 and x.shape[1] == weight.shape[1]
    few = few and native.fit(weight.shape[0], scale, bias)
    if few and native.usable(x, weight, scale) and (bias is None or native.usable(bias)):
        return native.few_rows(x, weight, scale, bias)
    if backend_for(x) == "vnni":
        return _vnni(x, weight, scale, bias)
    if x.dtype == torch.float16:  # before the scales the sums may be beyond its range
        return _product(x.float(), weight, scale, None if bias is None else bias.float()).half()
    h = x.new_empty(len(x), len(weight))
    for rows in _blocks(weight):
        torch.mm(x, weight[rows].to(x.dtype).T, out=h[:, rows])
    if bias is None or h.dtype != scale.dtype:
        return h.mul_(scale) if bias is None else h.mul_(scale).add_(bias)
    return torch.addcmul(bias, h, scale, out=h)


def input_gradient(g: Tensor, weight: Tensor, scale: Tensor, low: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """∂x = (g·diag(s))·W₈ + u·vᵀ for g [n, out] and low = (u [n, r], v [in, r]) or None; [n, in] in g's dtype."""
    if backend_for(g) == "triton":
        from lorakeet.kernels import int8_triton

        return int8_triton.input_gradient(g, weight, scale, low)
    dx = _input_gradient(g, weight, scale)
    return dx if low is None else _plus(dx, low)


def _plus(h: Tensor, low: tuple[Tensor, Tensor]) -> Tensor:
    """h + u·vᵀ, in place where the number formats allow it, else rounded once."""
    u, v = low
    if h.dtype == v.dtype:
        return h.addmm_(u, v.T)
    return torch.addmm(h.to(v.dtype), u, v.T).to(h.dtype)


def _input_gradient(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if backend_for(g) == "vnni":
        rounded, row_scale = _round_times(g.float(), scale)
        return _rescaled(torch._int_mm(rounded, weight), row_scale).to(g.dtype)
    scaled = (g * scale).to(g.dtype)
    dx = g.new_zeros(len(g), weight.shape[1])
    for rows in _blocks(weight):
        dx.addmm_(scaled[:, rows], weight[rows].to(g.dtype))
    return dx


def outlier_columns(x: Tensor) -> Tensor:
    """Numbers of the columns of x [n, in] that int8 cannot carry beside the others, int64 [at most in/16]."""
    if not x.numel():
        return torch.empty(0, dtype=torch.int64, device=x.device)
    x = x.float()
    if native.usable(x):
        largest, squares = native.columns(x)
        mean = squares.mean() / len(x)
    else:
        largest, mean = x.abs().amax(0), x.square().mean()
    limit = OUTLIER * mean.sqrt()
    found = (largest > limit).nonzero()[:, 0]
    most = int(x.shape[1] * MOST_OUTLIERS)
    return found if len(found) <= most else largest.topk(most).indices


def _vnni(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    wide = x.float()
    columns = outlier_columns(wide)
    rounded, row_scale = _round_times(wide, torch.ones_like(wide[0]).index_fill_(0, columns, 0))
    h = _rescaled(torch._int_mm(rounded, weight.T), row_scale, scale, None if bias is None else bias.float())
    if len(columns):
        h.addmm_(wide[:, columns], dequantise(weight[:, columns], scale).T)
    return h.to(x.dtype)


def _round_times(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """x·diag(factor) for x fp32 [n, in], rounded by rows: int8 [n, in] and fp32 [n]."""
    loops = native.usable(x, factor) and native.fit(x.shape[1], factor)
    return native.round_rows(x, factor) if loops else quantise_rows(x * factor)


def _rescaled(sums: Tensor, row_scale: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """int32 [n, out] -> fp32 diag(row_scale)·sums·diag(scale) + bias."""
    given = [t for t in (sums, row_scale, scale, bias) if t is not None]
    if native.usable(*given) and native.fit(sums.shape[1], scale, bias):
        return native.rescale(sums, row_scale, scale, bias)
    h = sums.float().mul_(row_scale.unsqueeze(1))
    h = h if scale is None else h.mul_(scale)
    return h if bias is None else h.add_(bias)


def _blocks(weight: Tensor) -> list[slice]:
    """Runs of output channels, each of about :data:`BLOCK` values."""
    size = TILE * max(2, BLOCK // (TILE * max(weight.shape[1], 1)))
    return [slice(at, min(at + size, len(weight))) for at in range(0, len(weight), size)]


# -- with autograd ----------------------------------------------------------------------------------------------------


class _Int8Linear(torch.autograd.Function):
    """x [..., in] -> [..., out]; nothing is remembered but the weight itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight, scale)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return product(rows, weight, scale, bias).view(*x.shape[:-1], len(weight))

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
    """A frozen linear layer in 8 bits.

    Args:
        x: [..., in], any floating dtype (under autocast it becomes that dtype).
        weight: int8 [out, in]; gets no gradient.
        scale: fp32 [out].
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    bias = None if bias is None else bias.to(x.dtype)
    if not torch.is_grad_enabled():
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return product(rows, weight, scale, bias).view(*x.shape[:-1], weight.shape[0])
    return _Int8Linear.apply(x, weight, scale, bias)
