"""PiSSA: the principal singular values and vectors of the weight are trained, the rest of it is frozen.

Meng, Wang and Zhang 2024 (arXiv:2404.02948), equations 2 to 4, with W = U·Σ·Vᵀ:

    A = √(Σ_r/s)·V_rᵀ        B = U_r·√(Σ_r/s)        W_res = W − s·B·A

At the start W_res + s·B·A = W, so the model answers as its base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.rng import seeded

#: Setting that asks for a fast SVD, before its number of subspace iterations.
FAST = "pissa_niter_"
#: Seed of the random projection of the fast SVD: a loaded adapter needs the same residual as the one that was trained.
_SEED = 0


def principal_pair(weight: Tensor, r: int, scaling: float, how: str = "pissa") -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] with s·B·A = the best approximation of the weight of rank r.

    Args:
        weight: [out, in] in fp32 or fp64.
        r: The rank.
        scaling: s.
        how: ``pissa``, or ``pissa_niter_N`` for a randomized SVD with N subspace iterations (Halko et al. 2011).
    """
    u, sigma, v = _svd(weight, r, how)
    root = (sigma / scaling).sqrt()
    return root[:, None] * v.T, u * root


def _svd(weight: Tensor, r: int, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [out, r], the singular values [r] and V [in, r]."""
    if how.startswith(FAST):
        with seeded(_SEED):
            return torch.svd_lowrank(weight, r, niter=int(how.removeprefix(FAST)))
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :r], sigma[:r], vh[:r].T
