"""Singular values of ΔW = s·B·A, from the factors alone; :mod:`lorakeet.lora.algebra.decomposition` has the vectors too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
