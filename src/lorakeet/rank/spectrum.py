"""Singular values of ΔW = s·B·A, from the factors alone.

With B = Q_b·R_b and Aᵀ = Q_a·R_a (QR decompositions), ΔW = Q_b·(s·R_b·R_aᵀ)·Q_aᵀ. The matrix in the middle is [r, r], and its
singular values are those of ΔW. So ΔW [out, in] is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

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


def singular_values(lora_A: Tensor, lora_B: Tensor, scaling: float) -> list[float]:
    """Compute the singular values of s·B·A, falling; as many as r, or as the smaller side of ΔW.

    R_a and R_b are taken from the Gram matrices A·Aᵀ and Bᵀ·B in fp64, without QR decompositions. The error
    is about 1e-8 of the largest value.

    Args:
        lora_A: A [r, in], any floating dtype.
        lora_B: B [out, r].
        scaling: s.
    """
    a, b = lora_A.double(), lora_B.double()
    values = torch.linalg.svdvals(scaling * _root(b.T @ b) @ _root(a @ a.T).T)
    return values[: min(*lora_A.shape, len(lora_B))].tolist()  # type: ignore[no-any-return]


def _root(gram: Tensor) -> Tensor:
    """Return R [r, r] with Rᵀ·R = ``gram``."""
    squares, vectors = torch.linalg.eigh(gram)
    return squares.clamp(min=0).sqrt()[:, None] * vectors.T


@dataclass(frozen=True)
class Spectrum:
    """Singular values σ of a layer's update, falling; of stacked experts or groups, those of each.

    Attributes:
        blocks: The singular values of each matrix of the layer.
    """

    blocks: tuple[tuple[float, ...], ...]

    @cached_property
    def squares(self) -> list[float]:
        """Mean σᵢ² over the matrices, for each i; their sum is the energy ‖ΔW‖² of a matrix."""
        return [sum(value**2 for value in column) / len(column) for column in zip(*self.blocks, strict=True)]

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), of all matrices together."""
        return math.sqrt(sum(self.squares) * len(self.blocks))

    @property
    def effective_rank(self) -> float:
        """exp(H), H the entropy of σᵢ/Σσ (Roy and Vetterli 2007): the rank if all σ were equal; 0 without an update."""
        values = [math.sqrt(square) for square in self.squares]
        shares = [value / sum(values) for value in values if value > 0]
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0

    @property
    def energy_kept(self) -> list[float]:
        """Share of the energy that the nearest update of rank 1, 2, … keeps; ones without an update."""
        whole, kept = sum(self.squares), 0.0
        shares = []
        for square in self.squares:
            kept += square
            shares.append(kept / whole if whole else 1.0)
        return shares

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that keeps this share of the energy of every matrix; 1 without an update."""
        ranks = (Spectrum((block,)).energy_kept for block in self.blocks)
        return max(next((i for i, kept in enumerate(k, 1) if kept >= energy), len(k)) for k in ranks)
