"""Sums of dense updates after pruning: magnitude pruning, DARE, TIES. Each is computed a few rows at a time.

- Magnitude pruning keeps the share ``density`` of the entries of each ΔWᵢ, those of largest magnitude.
- DARE (Yu et al. 2024, arXiv:2311.03099) keeps each entry with the probability ``density`` and divides it by that. The
  expected update stays the same.
- TIES (Yadav et al. 2023, arXiv:2306.01708) prunes by magnitude. Then each entry gets the sign that most of the updates
  have there (``total``: by summed value, ``frequency``: by count). The mean of those that agree remains.

The weights wᵢ multiply what remains, so they do not elect the sign; that order is PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Entries of each update that are dense at once, beside the result: small enough for a processor's cache.
_ENTRIES = 1 << 18
#: Entries of a matrix up to which it is computed in fp64.
_DOUBLE = 1 << 24


@dataclass(frozen=True)
class Term:
    """Summand w·ΔW with ΔW = s·B·A.

    Attributes:
        weight: w.
        scaling: s.
        A: [r, in]
        B: [out, r]
    """

    weight: float
    scaling: float
    A: Tensor
    B: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which ΔW is formed."""
        return torch.float64 if len(self.B) * self.A.shape[1] <= _DOUBLE else torch.float32

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows of ΔW, without the weight."""
        return self.scaling * (self.B[start:stop].to(self.dtype) @ self.A.to(self.dtype))


@dataclass(frozen=True)
class Pruning:
    """Choice of the entries of each update that are added up.

    Attributes:
        by: ``magnitude``, ``random``, or None for all entries.
        elect: Whether only entries of the elected sign count, and their mean is taken.
        density: Share of the entries that is kept, above 0, at most 1.
        majority: How a sign is elected: ``total`` by the summed values, ``frequency`` by the number of entries.
        generator: Random numbers of ``random``; None: torch's own.
    """

    by: Literal["magnitude", "random"] | None = None
    elect: bool = False
    density: float = 1.0
    majority: str = "total"
    generator: torch.Generator | None = None


def merged_update(terms: Sequence[Term], pruning: Pruning) -> Tensor:
    """Compute the sum of the updates after pruning, [out, in]: the only dense matrix that is held whole.

    Args:
        terms: Updates of one layer, all of one shape.
        pruning: The entries that count.
    """
    limits = [_limit(term, pruning) for term in terms]
    first = terms[0]
    merged = torch.empty(len(first.B), first.A.shape[1], dtype=first.dtype, device=first.A.device)
    for start, stop in row_ranges(first):
        parts = [_kept(term.rows(start, stop), limit, pruning) for term, limit in zip(terms, limits, strict=True)]
        merged[start:stop] = _sum(parts, [term.weight for term in terms], pruning)
    return merged


def row_ranges(term: Term) -> Iterator[tuple[int, int]]:
    """Yield the first and last row of each part of ΔW that is dense at once."""
    step = max(1, _ENTRIES // term.A.shape[1])
    return ((start, start + step) for start in range(0, len(term.B), step))


def _limit(term: Term, pruning: Pruning) -> float:
    """Return the smallest magnitude of an entry that is kept; infinite: none is."""
    size = len(term.B) * term.A.shape[1]
    count = int(pruning.density * size)
    if pruning.by != "magnitude" or count >= size:
        return 0.0
    if not count:
        return float("inf")
    magnitudes = torch.empty(len(term.B), term.A.shape[1], dtype=term.dtype)
    for start, stop in row_ranges(term):
        magnitudes[start:stop] = term.rows(start, stop).abs_()
    flat = magnitudes.flatten().numpy()
    flat.partition(size - count)  # in place: no second matrix
    return float(flat[size - count])


def _kept(rows: Tensor, limit: float, pruning: Pruning) -> Tensor:
    """Return rows of an update with zeros for the entries that are pruned."""
    if pruning.by == "random" and pruning.density < 1:
        draws = torch.rand(rows.shape, generator=pruning.generator)  # on the CPU: the same on every device
        return rows * (draws < pruning.density).to(rows) / pruning.density
    return rows if limit == 0 else rows * (rows.abs() >= limit)


def _sum(parts: Sequence[Tensor], weights: Sequence[float], pruning: Pruning) -> Tensor:
    """Add up pruned rows of each update; with ``elect`` take the mean of the entries that have the elected sign."""
    total, count = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    votes = torch.zeros_like(total)
    for part in parts if pruning.elect else ():
        votes += part if pruning.majority == "total" else part.sign()
    for part, weight in zip(parts, weights, strict=True):
        agrees = torch.where(votes >= 0, part > 0, part < 0).to(part) if pruning.elect else 1.0
        total += weight * part * agrees
        count += agrees
    return total / count.clamp_(min=1) if pruning.elect else total
