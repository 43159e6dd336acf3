"""The nearest matrix of low rank to a dense one: an exact decomposition of small matrices, a randomized one of large.

Halko, Martinsson and Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1. Products of M and Mᵀ with a few random vectors
find the range of M. M is projected on it, and the small rest is decomposed exactly. More vectors than the rank and
repeated products (power iterations) make it as good as the exact one wherever the singular values fall.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.lora.algebra.decomposition import Decomposition

#: Length of the shorter side up to which a decomposition is exact; that of 1,024 x 1,024 takes half a second.
EXACT = 1024
#: Random vectors beyond the rank: as many again, and some.
_MORE = 16
#: Products with M and Mᵀ, which part neighbouring singular values.
_POWERS = 4
#: Numbers up to which fp64 is used.
_DOUBLE = 1 << 26


def nearest(matrix: Tensor, rank: int) -> Decomposition:
    """Compute the largest singular values of a matrix, at least ``rank`` of them as far as there are.

    Args:
        matrix: [out, in], any floating dtype.
        rank: The rank of the approximation that is wanted.
    """
    matrix = matrix.to(torch.float64 if matrix.numel() <= _DOUBLE else torch.float32)
    width = 2 * rank + _MORE
    if min(matrix.shape) <= max(EXACT, width):
        return _exact(matrix)
    Q = _range(matrix, width)
    found = _exact(Q.T @ matrix)
    return Decomposition(Q.double() @ found.U, found.values, found.V)


def nearest_for_energy(matrix: Tensor, energy: float) -> tuple[Decomposition, int]:
    """Compute the largest singular values of a matrix, up to the rank that keeps a share of its energy.

    Args:
        matrix: [out, in], any floating dtype.
        energy: Share of ‖M‖² to keep, above 0, at most 1.

    Returns:
        The decomposition, and the smallest rank that keeps the share.
    """
    whole, rank = float(matrix.double().square().sum()), 32
    while True:
        found = nearest(matrix, rank)
        kept = found.values.square().cumsum(0)
        if whole == 0:
            return found, 1
        enough = int((kept < energy * whole * (1 - 1e-12)).sum()) + 1
        if enough <= rank or len(found.values) == min(matrix.shape):
            return found, min(enough, len(found.values))
        rank *= 2


def _exact(matrix: Tensor) -> Decomposition:
    """Compute the singular value decomposition of a matrix."""
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Decomposition(U.double(), values.double(), Vh.T.double())


def _range(matrix: Tensor, width: int) -> Tensor:
    """Return orthonormal columns [out, width] that span nearly all of the matrix's largest directions."""
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(matrix.shape[1], width, generator=random, dtype=matrix.dtype).to(matrix.device)
    Q = torch.linalg.qr(matrix @ vectors).Q
    for _ in range(_POWERS):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    return Q
