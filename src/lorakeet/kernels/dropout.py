"""Dropout that recomputes its mask from a seed, so that backward needs no stored copy.

``dropout(x) = x · m / (1 - p)`` with m a 0/1 mask (Srivastava et al. 2014). A mask costs 16 random bits an element, so p
is rounded to a multiple of 2⁻¹⁶ and the scale uses the rounded value: the expectation stays exact.

On a CPU these bits are a hash of the element's index and the seed: any thread can compute them where it needs them, and the
mask is never stored (``elementwise.c``). Elsewhere the device's generator draws them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings

_LEVELS = 1 << 16
_32_BITS, _64_BITS = (1 << 32) - 1, (1 << 64) - 1


def dropped_levels(p: float) -> int:
    """Return p in units of 2⁻¹⁶, at most 65535, so that some elements are kept for any p."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_scale(p: float) -> float:
    """Return 1 / (1 - p) for the rounded p that the mask has."""
    return _LEVELS / (_LEVELS - dropped_levels(p))


def draw_seed() -> int:
    """Draw a seed from torch's CPU generator, so that runs repeat and checkpointed layers recompute the same mask."""
    return int(torch.empty((), dtype=torch.int64).random_())


def keep_mask(seed: int, shape: torch.Size | tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Compute the bool mask of ``seed``, False with probability p; seed, shape and device determine it.

    Args:
        seed: From :func:`draw_seed`.
        shape: Shape of the mask.
        p: Probability of a False, 0 <= p < 1.
        device: Device of the mask.

    Returns:
        bool, of ``shape``.
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
    """Compute 32 bits for each index, int64 [count]; ``elementwise.c`` has the same hash."""
    low, high = seed_halves(seed)
    bits = (torch.arange(count) + low) & _32_BITS
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D & _32_BITS) ^ high
    bits = (bits ^ (bits >> 15)) * 0x846CA68B & _32_BITS  # overflow beyond 64 bits does not reach the low 32
    return bits ^ (bits >> 16)


def seed_halves(seed: int) -> tuple[int, int]:
    """Mix the bits of a seed (splitmix64, Steele et al. 2014), so that close seeds differ in all; low, high half."""
    bits = seed + 0x9E3779B97F4A7C15 & _64_BITS
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _64_BITS
    bits ^= bits >> 31
    return bits & _32_BITS, bits >> 32


def dropout_reference(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Compute the reference: x · mask / (1 - p), in the dtype of x."""
    return x * mask * keep_scale(p)


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """Compute x · m / (1 - p) with the mask of ``seed``, without a gradient; x [...], floating."""
    if bindings.supports(x):
        return bindings.dropout(x, None, dropped_levels(p), keep_scale(p), *seed_halves(seed))
    return dropout_reference(x, keep_mask(seed, x.shape, p, x.device), p)


def plus_dropped(y: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    """Compute y + x · m / (1 - p) without a gradient, in y's memory where the dtypes allow it.

    Args:
        y: [...], floating.
        x: [...], the shape of ``y``.
        p: Dropout probability.
        seed: From :func:`draw_seed`.

    Returns:
        [...] in y's memory, or a new tensor.
    """
    if bindings.supports(x, y) and x.shape == y.shape:
        return bindings.dropout(x, y, dropped_levels(p), keep_scale(p), *seed_halves(seed))
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
    """Apply dropout to x (any shape, floating); backward needs only the seed."""
    if not training or p == 0.0:
        return x
    return _SeededDropout.apply(x, p, draw_seed())
