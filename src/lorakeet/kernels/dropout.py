"""Dropout whose mask is made again from a seed, so that backward needs no stored copy of it.

``dropout(x) = x · m / (1 - p)`` with m a 0/1 mask (Srivastava et al. 2014). A mask costs 16 random bits an element, so p
is rounded to a multiple of 2⁻¹⁶ and the scale uses the rounded value: the expectation stays exact.

On a CPU these bits are a hash of the element's place and the seed: any thread can make them where it needs them, and the
mask is never written down (``elementwise.c``). Elsewhere they are drawn by the device's own generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings

_LEVELS = 1 << 16
_32_BITS, _64_BITS = (1 << 32) - 1, (1 << 64) - 1


def dropped_levels(p: float) -> int:
    """p as a count of 2⁻¹⁶ steps, at most 65535 so that something is always kept."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_scale(p: float) -> float:
    """1 / (1 - p), for the p that the mask really has."""
    return _LEVELS / (_LEVELS - dropped_levels(p))


def draw_seed() -> int:
    """A seed from torch's default CPU generator, so that runs repeat and checkpointed layers recompute the same mask."""
    return int(torch.empty((), dtype=torch.int64).random_())


def keep_mask(seed: int, shape: torch.Size | tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """The bool mask of ``seed``: False with probability p. The same seed, shape and device give the same mask.

    Args:
        seed: From :func:`draw_seed`.
        shape: Shape of the mask.
        p: Probability of a False, 0 <= p < 1.
        device: Where the mask is made.
    """
    count = 1
    for size in shape:
        count *= size
    if device.type == "cpu":
        return (_hash(seed, count) >> 16).view(shape) >= dropped_levels(p)
    generator = torch.Generator(device=device).manual_seed(seed)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)  # all 64 bits: four draws a word
    draws = words.view(torch.int16)[:count].view(shape)
    return draws >= dropped_levels(p) - _LEVELS // 2


def _hash(seed: int, count: int) -> Tensor:
    """32 bits for each place, int64 [count]: as ``dropout`` in ``elementwise.c`` has them."""
    low, high = _halves(seed)
    bits = (torch.arange(count) + low) & _32_BITS
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D & _32_BITS) ^ high
    bits = (bits ^ (bits >> 15)) * 0x846CA68B & _32_BITS  # what is lost beyond 64 bits is lost beyond 32 too
    return bits ^ (bits >> 16)


def _halves(seed: int) -> tuple[int, int]:
    """A seed's bits mixed (splitmix64, Steele et al. 2014), low and high: seeds that are near each other are no longer so."""
    bits = seed + 0x9E3779B97F4A7C15 & _64_BITS
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _64_BITS
    bits ^= bits >> 31
    return bits & _32_BITS, bits >> 32


def dropout_reference(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """The slow truth: x · mask / (1 - p), in the dtype of x."""
    return x * mask * keep_scale(p)


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x · m / (1 - p) with the mask of ``seed``; x [...], floating. No gradient."""
    if bindings.supports(x):
        return bindings.dropout(x, None, dropped_levels(p), keep_scale(p), *_halves(seed))
    return dropout_reference(x, keep_mask(seed, x.shape, p, x.device), p)


def plus_dropped(y: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    """y + x · m / (1 - p) for y and x of one shape, in y's memory where the dtypes allow it. No gradient."""
    if bindings.supports(x, y) and x.shape == y.shape:
        return bindings.dropout(x, y, dropped_levels(p), keep_scale(p), *_halves(seed))
    return y + dropped(x, p, seed)


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float, seed: int) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.p, ctx.seed = p, seed
        return dropped(x, p, seed)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        return dropped(grad, ctx.p, ctx.seed), None, None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of x (any shape, floating) that stores a seed for backward instead of a mask."""
    if not training or p == 0.0:
        return x
    return _SeededDropout.apply(x, p, draw_seed())
