"""Singular value decomposition of ΔW = s·B·A, from the factors alone.

With B = Q_b·R_b and Aᵀ = Q_a·R_a (QR decompositions), ΔW = Q_b·(s·R_b·R_aᵀ)·Q_aᵀ. The matrix in the middle is [r, r], and its
singular values are those of ΔW. So ΔW [out, in] is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """Singular value decomposition of one update: ΔW = U·diag(values)·Vᵀ.

    Attributes:
        U: [out, k], orthonormal columns, fp64.
        values: [k], not negative, falling, fp64.
        V: [in, k], orthonormal columns, fp64.
    """

    U: Tensor
    values: Tensor
    V: Tensor

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B [out, rank] of the nearest ΔW of this rank (Eckart and Young 1936), with s = 1.

        Rows beyond the number of singular values are zero in B, and orthonormal or zero in A. The rows of A are orthonormal
        and B has the singular values, so a layer that did not learn can still be trained.
        """
        kept = min(rank, len(self.values))
        a, b = self.V.new_zeros(rank, len(self.V)), self.U.new_zeros(len(self.U), rank)
        a[:kept] = self.V[:, :kept].T
        b[:, :kept] = self.U[:, :kept] * self.values[:kept]
        return a, b


def decompose(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Decomposition:
    """Compute the singular value decomposition of s·B·A.

    Args:
        lora_A: A [r, in], any floating dtype.
        lora_B: B [out, r].
        scaling: s.
    """
    Q_a, R_a = torch.linalg.qr(lora_A.double().T)
    Q_b, R_b = torch.linalg.qr(lora_B.double())
    u, values, vh = torch.linalg.svd(scaling * R_b @ R_a.T, full_matrices=False)
    return Decomposition(Q_b @ u, values, Q_a @ vh.T)
