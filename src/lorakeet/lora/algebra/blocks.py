"""Blocks of stored factors: A and B of one matrix, or side by side those of stacked experts or of a convolution's groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Block = tuple[Tensor, Tensor]  # A [r, in] and B [out, r]


def split_blocks(a: Tensor, b: Tensor, r: int) -> list[Block]:
    """Return the A [r, in] and B [out, r] that are multiplied: one of each, or one for each group or expert.

    Args:
        a: A as it is stored, [r, in, *kernel] or [r·experts, in].
        b: B as it is stored, [out, r / groups, ...] or [out, r·experts].
        r: The rank: of stacked experts, of each.
    """
    a, b = a.flatten(1), b.flatten(1)
    if groups := len(a) // b.shape[1] - 1:
        return list(zip(a.chunk(groups + 1), b.chunk(groups + 1), strict=True))
    experts = len(a) // r
    return list(zip(a.chunk(experts), (b[:, e::experts] for e in range(experts)), strict=True))


def join_blocks(blocks: Sequence[Block], like_a: Tensor, like_b: Tensor) -> Block:
    """Return A and B as they are stored; the inverse of :func:`split_blocks`.

    Args:
        blocks: A [r, in] and B [out, r] of each group or expert, all of one rank.
        like_a: Stored A of the same layer, of any rank; it tells the kernel and the dtype.
        like_b: Stored B of the same layer.
    """
    each, count = len(blocks[0][0]), len(blocks)
    a = torch.cat([part for part, _ in blocks]).to(like_a).reshape(count * each, *like_a.shape[1:])
    if count > 1 and len(like_a) == like_b.shape[1]:  # experts: column ρ·experts + e of B belongs to expert e
        b = torch.stack([part for _, part in blocks], dim=2).flatten(1)
    else:
        b = torch.cat([part for _, part in blocks])
    return a, b.to(like_b).reshape(len(like_b), -1, *like_b.shape[2:])
