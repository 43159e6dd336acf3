"""A frozen weight in 8 bits: W₀ ≈ diag(s)·W₈·diag(c), W₈ int8 [out, in], a scale s for each output channel and, where the
rounding is to be finer, a scale c for each input channel.

    h  = (x·diag(c))·W₈ᵀ·diag(s) + b            ∂x = (g·diag(s))·W₈·diag(c)

The input channels' scales even out the columns of the weight, so that one of small values, which as a rule meets large
activations, is not rounded by the step of the others; x·diag(c) is flatter than x for the same reason. They are powers of
two: multiplying by them rounds nothing.

A few columns are kept as they are where a weight narrows (in > out), as the last one of a feed-forward block does: those of
its largest values. There a few weights make the activations of a text's first token some thousand times larger than all
others, and take them away again (Yu et al. 2024, "The Super Weight in Large Language Models", arXiv:2411.07191); rounded,
such a column does more harm than all others together. Where a column is kept c is 0, and x times its values is added.

All that belongs to a weight's bytes is one vector: s [out]; or s, c [out + in]; or s, c, the kept columns' values and their
places [out + in + KEPT·(out + 1)].

Both directions read the one stored weight, and neither ever makes the whole of it in a wider format. Four back ends:

- ``blocked``: a few rows of W₈ at a time become x's dtype (which holds every int8 exactly), small enough to stay in the
  processor's cache, and are multiplied there; the scales are put on what comes out, or on g before it goes in. Exact but
  for the weight's own rounding. For processors without 8-bit dot products, and everywhere else.
  One or few tokens are multiplied by the bytes as they are read (:mod:`lorakeet.kernels.cpu.bindings`).
- ``pairs``: x is rounded to 16 bits with one scale for each token, the weight's bytes become 16 bits wide a few at a time,
  and neighbours are multiplied and summed in pairs, in int32. Rounding x to 16 bits costs less than bfloat16 would, so
  nothing is split off, and an instruction does twice as many products as in fp32 (``gemm_w8a16.c``). Needs AVX2.
- ``vnni``: the same forward, and twice as fast backward: the gradient is rounded to int8 with one scale for each token and
  64 neighbouring channels, multiplied as int8, and 64 products at a time are summed in int32, then scaled and added in fp32
  (``gemm_w8a8_grouped.c``). What this loses is noise in the gradient, and far below that of a batch; forward it would
  be a share of the loss. For x86 processors with VNNI.
- ``triton``: x and the gradient are rounded to int8 with one scale for each token, all but the columns that int8 cannot
  carry; those are multiplied apart in x's dtype (the split of LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section
  3.2, with outliers known by the tensor's own size and not by a fixed threshold), in kernels for NVIDIA GPUs
  (:mod:`lorakeet.kernels.int8.triton`).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.cpu.memory import passing

Backend = Literal["blocked", "pairs", "vnni", "triton"]

#: Values of the weight that are made wide at once: 1 MB in fp32.
BLOCK = 1 << 18
#: Output channels in a block: a multiple of this, for the tiles of matrix products, and at least twice as many.
TILE = 128
#: So many tokens, or fewer, are multiplied while the weight is read.
FEW = 16
#: So many channels of a gradient share a scale in ``vnni``; ``gemm_w8a8_grouped.c`` has the same number.
GROUP = 64
#: What rounding a gradient to a vocabulary takes from a value is given to the one so many further on (``gemm_tiles.h``).
LANES = 16
#: How often rows and columns are evened out in turn, and how far a column's scale may go, as a power of two.
EVEN_ROUNDS, EVEN_MOST = 4, 12
#: So many columns of a weight that narrows are kept as they are.
KEPT = 2


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
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


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight after its columns are made even (SINQ, Müller et al. 2025, arXiv:2509.22944, with one pair of scales
    for the whole weight and powers of two for its columns), all but the columns that are kept.

    Args:
        weight: [out, in], any floating dtype, finite.

    Returns:
        int8 [out, in] in −127…127, and fp32 [:func:`scales_of`]: the scales of the output channels, then those of the input
        channels, and where in > out the values of :data:`KEPT` columns, one after the other, and their places.
    """
    weight = weight.float()
    if scales_of(*weight.shape) == sum(weight.shape):
        columns = even_columns(weight)
        rounded, rows = quantize_rows(weight / columns)
        return rounded, torch.cat((rows, columns))
    at = weight.abs().amax(0).topk(KEPT).indices.sort().values
    rest = weight.index_fill(1, at, 0)
    columns = even_columns(rest)
    rounded, rows = quantize_rows(rest / columns)
    return rounded, torch.cat((rows, columns.index_fill(0, at, 0), weight[:, at].T.flatten(), at))


def scales_of(out: int, inner: int) -> int:
    """How many numbers belong to the bytes of a weight [out, in] (not to those of a vocabulary: out)."""
    return out + inner + (KEPT * (out + 1) if inner > max(out, KEPT) and out else 0)


def even_columns(weight: Tensor) -> Tensor:
    """Powers of two [in], fp32: divided by them, the columns of a weight [out, in] have about one size, and so have its rows
    divided by theirs (the iteration of Sinkhorn and Knopp, on squares)."""
    largest = weight.abs().amax().float() if weight.numel() else torch.ones(())
    squares = (weight.float() / largest.clamp_min(torch.finfo(torch.float32).tiny)).square_()
    least, columns = 1e-30, torch.ones(weight.shape[1], device=weight.device)
    for _ in range(EVEN_ROUNDS):
        rows = squares @ columns.reciprocal()
        columns = torch.where(rows > least, rows, torch.inf).reciprocal() @ squares
        columns = torch.where(columns > least, columns, columns.mean().clamp_min(least))
    exponents = columns.log2() / 2
    return (exponents - exponents.mean()).round_().clamp_(-EVEN_MOST, EVEN_MOST).exp2_()


def split_scale(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scales of a weight's output channels, [out], and of its input channels, [in] or None."""
    out, inner = weight.shape
    if scale.shape[0] not in (out + inner, scales_of(out, inner)):  # what does not fit fails where it is used
        return scale, None
    return scale[:out], scale[out : out + inner]


def kept_columns(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """The places of the columns that are kept, fp32 [KEPT], and their values, fp32 [KEPT, out]; None where none are."""
    out, inner = weight.shape
    if scale.shape[0] == out + inner or scale.shape[0] != scales_of(out, inner):
        return None
    return scale[-KEPT:], scale[out + inner : -KEPT].view(KEPT, out)


def dequantize(
    weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, at: Tensor | slice = slice(None)
) -> Tensor:
    """The weight, [out, in], or its rows ``at`` some places, in ``dtype``: for checks and merging, never for a product."""
    rows, columns = split_scale(weight, scale)
    wide = weight[at].float() * rows[at].unsqueeze(1)
    if columns is not None:
        wide = wide.mul_(columns)
    if kept := kept_columns(weight, scale):
        wide.index_copy_(1, kept[0].long(), kept[1][:, at].T)
    return wide.to(dtype)


def rounding_steps(weight: Tensor, scale: Tensor) -> Tensor:
    """How far apart the values lie that each number of a weight was rounded to, fp32 [out, in]; 0 where a column is kept."""
    rows, columns = split_scale(weight, scale)
    return rows.unsqueeze(1).expand_as(weight) if columns is None else rows.unsqueeze(1) * columns


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The slow truth of ``blocked``: multiply by the dequantised weight."""
    return F.linear(x, dequantize(weight, scale, x.dtype), bias)


def rounded_groups(x: Tensor, even: bool = False) -> Tensor:
    """x fp32 [n, columns] after each run of :data:`GROUP` columns of a row was rounded to int8 by its largest value.

    With ``even`` what rounding takes from a value is added to the one :data:`LANES` further on, before that one is rounded.
    """
    groups = F.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP // LANES, LANES).clone()
    made, carry = torch.empty_like(groups), x.new_zeros(len(x), LANES)
    for group, to in zip(groups.unbind(1), made.unbind(1), strict=True):
        if even:
            group[:, 0] += carry
        largest = group.abs().amax((1, 2)).unsqueeze(1)
        scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
        for at in range(GROUP // LANES):
            value = group[:, at] + carry if even and at else group[:, at]
            to[:, at] = (value * (127 / largest)).nan_to_num(0).round().clamp(-127, 127) * scale
            carry = value - to[:, at]
    return made.view(len(x), -1)[:, : x.shape[1]]


def vnni_gradient_reference(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The slow truth of ``vnni``'s gradient to the input for g fp32 [n, out]: rounded by groups, then in fp64."""
    rows, columns = split_scale(weight, scale)
    dx = rounded_groups(g * rows, even=columns is None).double() @ weight.double()
    dx = (dx if columns is None else dx * columns).to(g.dtype)
    kept = kept_columns(weight, scale)
    return dx if kept is None else dx.index_copy(1, kept[0].long(), g @ kept[1].T)


@cache
def choose_backend() -> Literal["blocked", "pairs", "vnni"]:
    """What this processor is best at; ``LORAKEET_INT8=blocked``, ``pairs`` or ``vnni`` overrules it."""
    asked, pairs = os.environ.get("LORAKEET_INT8"), bindings.has_pairs()
    if asked in ("blocked", "vnni") or (asked == "pairs" and pairs):
        return asked  # type: ignore[return-value]
    if bindings.has_dots() or torch.cpu._is_vnni_supported():
        return "vnni"
    return "pairs" if pairs else "blocked"


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
    from lorakeet.kernels.int8 import triton

    return "triton" if os.environ.get("LORAKEET_INT8") != "blocked" and triton.available(device)[0] else "blocked"


# -- products, without autograd ---------------------------------------------------------------------------------------


def product(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, low: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """h = (x·diag(c))·W₈ᵀ·diag(s) + b + u·vᵀ for x [n, in], low = (u [n, r], v [out, r]) or None; [n, out] in x's dtype.

    What x makes of the columns that are kept is in it too.
    """
    rows, columns = split_scale(weight, scale)
    kept = kept_columns(weight, scale)
    from_kept = None if kept is None else (x.index_select(1, kept[0].long()).to(kept[1].dtype), kept[1].T)
    if backend_for(x) == "triton":
        from lorakeet.kernels.int8 import triton

        h = triton.product(_times(x, columns), weight, rows, bias, low)
        return h if from_kept is None else _plus(h, from_kept)
    if low is not None and from_kept is not None:
        low = torch.cat((low[0], from_kept[0]), 1), torch.cat((low[1], from_kept[1]), 1)
    return _product(x, weight, rows, columns, bias, low or from_kept)


def _product(
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    low: tuple[Tensor, Tensor] | None,
) -> Tensor:
    if backend_for(x) != "blocked" and bindings.has_pairs():
        wide, wide_bias = x.float().contiguous(), None if bias is None else bias.float()
        if x.shape[1] == weight.shape[1] and _loops_take(wide, weight, rows, columns, wide_bias):
            inside = low is not None and bindings.adds(*low)
            h = bindings.pair_product(wide, weight, rows, columns, wide_bias, low if inside else None).to(x.dtype)
            return h if low is None or inside else _plus(h, low)
    h = _blocked_product(x, weight, rows, columns, bias)
    return h if low is None else _plus(h, low)


def _blocked_product(x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None) -> Tensor:
    few = x.shape[0] <= FEW and x.dtype == torch.float32  # len() of a tensor costs as much as a small product
    if few and x.shape[1] == weight.shape[1] and _loops_take(x, weight, rows, columns, bias):
        return bindings.few_rows(x, weight, rows, columns, bias)
    if x.dtype == torch.float16:  # before the scales the sums may be beyond its range
        return _blocked_product(x.float(), weight, rows, columns, None if bias is None else bias.float()).half()
    x = _times(x, columns)
    h = passing(x, len(x), len(weight))
    for block in _blocks(weight):
        torch.mm(x, weight[block].to(x.dtype).T, out=h[:, block])
    if bias is None or h.dtype != rows.dtype:
        return h.mul_(rows) if bias is None else h.mul_(rows).add_(bias)
    return torch.addcmul(bias, h, rows, out=h)


def input_gradient(g: Tensor, weight: Tensor, scale: Tensor, low: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """∂x = (g·diag(s))·W₈·diag(c) + u·vᵀ for g [n, out] and low = (u [n, r], v [in, r]) or None; [n, in] in g's dtype.

    A weight without column scales is a vocabulary's, and g the softmax less its target: a few large values, and very many
    small ones that make up for them, as the sum of all is 0. Rounded one by one most of the small ones would be lost, all
    to the same side, and that side is the mean of all tokens' vectors, the same in each step. So there what rounding takes
    from a value is given to a later one, or nothing is rounded.
    """
    rows, columns = split_scale(weight, scale)
    if backend_for(g) == "triton" and columns is not None:
        from lorakeet.kernels.int8 import triton

        dx = triton.input_gradient(g, weight, rows).mul_(columns)
    else:
        dx = _input_gradient(g, weight, rows, columns)
    if kept := kept_columns(weight, scale):
        if bindings.has_pairs() and bindings.takes(g, dx, *kept):
            bindings.kept_gradient(g, *kept, dx)
        else:
            dx.index_copy_(1, kept[0].long(), (g.to(kept[1].dtype) @ kept[1].T).to(dx.dtype))
    return dx if low is None else _plus(dx, low)


def _plus(h: Tensor, low: tuple[Tensor, Tensor]) -> Tensor:
    """h + u·vᵀ, in place where the number formats allow it, else rounded once."""
    u, v = low
    if h.dtype == v.dtype:
        return h.addmm_(u, v.T)
    return torch.addmm(h.to(v.dtype), u, v.T).to(h.dtype)


def _times(x: Tensor, columns: Tensor | None) -> Tensor:
    """x·diag(c), in x's dtype: exact, as c are powers of two."""
    return x if columns is None else x * columns.to(x.dtype)


def _input_gradient(g: Tensor, weight: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
    backend = backend_for(g)
    if backend in ("pairs", "vnni"):
        wide = g.float().contiguous()
        if bindings.has_pairs() and g.shape[1] == weight.shape[0] and _loops_take(wide, weight, rows, columns):
            multiply = bindings.pair_gradient if backend == "pairs" else bindings.group_gradient
            return multiply(wide, weight, rows, columns, even=columns is None).to(g.dtype)
        if backend == "vnni" and columns is not None:
            rounded, row_scale = quantize_rows(wide * rows)
            return torch._int_mm(rounded, weight).float().mul_(row_scale.unsqueeze(1)).mul_(columns).to(g.dtype)
    scaled = (g * rows).to(g.dtype)
    dx = g.new_zeros(len(g), weight.shape[1])
    for block in _blocks(weight):
        dx.addmm_(scaled[:, block], weight[block].to(g.dtype))
    return dx if columns is None else dx.mul_(columns)


def _loops_take(x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None = None) -> bool:
    """Whether the compiled loops can multiply these: something, the scales that belong to it, and memory as they read it."""
    out, inner = weight.shape
    if not (x.shape[0] and out and inner and weight.dtype == torch.int8):
        return False
    fit = bindings.fit(out, rows, bias) and bindings.fit(inner, columns)
    return fit and bindings.usable(*[t for t in (x, weight, rows, columns, bias) if t is not None])


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
        h = product(rows, weight, scale, bias)  # no view where none is needed: views may not be overwritten
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
    """A frozen linear layer in 8 bits.

    Args:
        x: [..., in], any floating dtype (under autocast it becomes that dtype).
        weight: int8 [out, in]; gets no gradient.
        scale: fp32, what belongs to the weight's bytes: see the top of this module.
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
