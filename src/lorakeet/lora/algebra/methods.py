"""Methods to combine the updates of one layer, each defined on the dense ΔWᵢ = sᵢ·BᵢAᵢ, never on A and B alone.

- ``linear``, ``cat``: Σ wᵢ·ΔWᵢ, exact, of rank Σ rᵢ.
- ``svd``: the nearest to that, of a given rank (Eckart and Young 1936).
- ``magnitude_prune``, ``ties``, ``dare_linear``, ``dare_ties``: pruned updates added up (:mod:`.pruning`). That sum has full
  rank, and the nearest to it of rank Σ rᵢ is taken.
- The same with ``_svd``: the nearest to it of a given rank.

B₁A₁ + B₂A₂ is not (B₁ + B₂)(A₁ + A₂). PEFT's ``linear``, and its pruning without ``_svd``, compute the latter: they add up
the A and the B, which leaves the cross terms B₁A₂ and B₂A₁ in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import AdapterError, did_you_mean
from lorakeet.lora.algebra.approximation import nearest
from lorakeet.lora.algebra.blocks import Block, join_blocks, split_blocks
from lorakeet.lora.algebra.decomposition import Decomposition, decompose
from lorakeet.lora.algebra.pruning import Pruning, Term, merged_update

#: No pruning.
_ALL = Pruning()
#: Prunings by the name of their method, without ``_svd``.
_PRUNINGS: dict[str, dict[str, Any]] = {
    "magnitude_prune": {"by": "magnitude"},
    "ties": {"by": "magnitude", "elect": True},
    "dare_linear": {"by": "random"},
    "dare_ties": {"by": "random", "elect": True},
}
#: Values of ``combination_type``, PEFT's.
METHODS = ("linear", "cat", "svd", *_PRUNINGS, *(f"{name}_svd" for name in _PRUNINGS))
#: Values of ``majority_sign_method``.
MAJORITIES = ("total", "frequency")


@dataclass(frozen=True)
class Method:
    """A method and its settings.

    Attributes:
        name: One of :data:`METHODS`.
        rank: The rank of the methods with ``svd``; None: the largest rank of the adapters.
        pruning: The entries that are added up.
        clamp: Quantile of the values of A and B beyond which they are clamped, of the methods with ``svd``.
    """

    name: str
    rank: int | None = None
    pruning: Pruning = _ALL
    clamp: float | None = None

    @property
    def cuts(self) -> bool:
        """Whether the result has a given rank."""
        return self.name.endswith("svd")

    @property
    def prunes(self) -> bool:
        """Whether entries of the updates are left out."""
        return self.pruning.by is not None


def make_method(
    name: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    clamp: float | None = None,
    generator: torch.Generator | None = None,
) -> Method:
    """Return a method with checked settings.

    Args:
        name: One of :data:`METHODS`.
        rank: The rank of the methods with ``svd``, at least 1; None: the largest rank of the adapters.
        density: Share of the entries that pruning keeps, above 0, at most 1.
        majority_sign_method: One of :data:`MAJORITIES`, for TIES.
        clamp: Quantile above 0, at most 1, for the methods with ``svd``.
        generator: Random numbers of DARE; None: torch's own.

    Raises:
        AdapterError: A name is unknown, or a setting is missing or out of range.
    """
    base = name.removesuffix("_svd")
    errors = []
    if name not in METHODS:
        errors.append(f"unknown combination_type {name!r}, expected one of {', '.join(METHODS)}")
    if base in _PRUNINGS and (density is None or not 0 < density <= 1):
        errors.append(f"{name} has density {density}, expected the share of entries to keep, above 0 and at most 1")
    if majority_sign_method not in MAJORITIES:
        errors.append(f"majority_sign_method is {majority_sign_method!r}, expected {' or '.join(MAJORITIES)}")
    if rank is not None and rank < 1:
        errors.append(f"svd_rank is {rank}, expected at least 1")
    if clamp is not None and not 0 < clamp <= 1:
        errors.append(f"svd_clamp is {clamp}, expected a quantile above 0 and at most 1")
    if errors:
        near = did_you_mean(name, METHODS) if name not in METHODS else None
        raise AdapterError("; ".join(errors), near or "linear is exact and needs no further setting")
    settings: dict[str, Any] = {"density": density, "majority": majority_sign_method, "generator": generator}
    pruning = Pruning(**_PRUNINGS[base], **settings) if base in _PRUNINGS else _ALL
    return Method(name, rank, pruning, clamp)


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one adapter in one layer, as it is stored, and its weight in the sum.

    Attributes:
        weight: w.
        scaling: s.
        rank: r; of stacked experts, of each.
        A: [r, in, *kernel] or [r·experts, in]
        B: [out, r, ...] or [out, r·experts]
        bias: The bias of B [out], which s multiplies too; None without one.
    """

    weight: float
    scaling: float
    rank: int
    A: Tensor
    B: Tensor
    bias: Tensor | None = None

    def terms(self) -> list[Term]:
        """Return w·s·B·A of each group or expert."""
        blocks = split_blocks(self.A.detach(), self.B.detach(), self.rank)
        return [Term(self.weight, self.scaling, a, b) for a, b in blocks]


@dataclass(frozen=True)
class CombinedLayer:
    """The combined update of one layer, as it is stored, with s = 1.

    Attributes:
        rank: r; of stacked experts, of each.
        A: As in :class:`LayerUpdate`.
        B: As in :class:`LayerUpdate`.
        bias: The bias of B; None if no adapter has one.
        energy_kept: Share of the energy ‖ΔW‖² of the combination by its definition that B·A has.
    """

    rank: int
    A: Tensor
    B: Tensor
    bias: Tensor | None
    energy_kept: float


@torch.no_grad()
def combine_layer(updates: Sequence[LayerUpdate], method: Method, largest: int) -> CombinedLayer:
    """Combine the updates of one layer.

    Args:
        updates: One for each adapter that has the layer.
        method: The method.
        largest: The largest rank of the adapters in any layer.
    """
    blocks = list(zip(*(update.terms() for update in updates), strict=True))
    experts = updates[0].rank * len(blocks) == len(updates[0].A)
    wanted = method.rank or largest
    rank = max(1, wanted if experts else wanted // len(blocks))  # groups share the rank
    made = [_combine(block, method, rank) for block in blocks]
    a, b = join_blocks([factors for factors, _ in made], updates[0].A, updates[0].B)
    whole = sum(energy for _, (energy, _) in made)
    kept = sum(part for _, (_, part) in made) / whole if whole else 1.0
    return CombinedLayer(len(a) // len(blocks) if experts else len(a), a, b, _bias(updates, method), min(1.0, kept))


def _combine(terms: Sequence[Term], method: Method, rank: int) -> tuple[Block, tuple[float, float]]:
    """Return A and B of one matrix; and the energy of the combination, and of what B·A keeps of it."""
    a, b = _side_by_side(terms)
    if not method.prunes:
        if not method.cuts:
            return (a, b), (1.0, 1.0)
        found = decompose(a, b, 1.0)
        whole = float(found.values.square().sum())
    else:
        dense = merged_update(terms, method.pruning)
        rank = rank if method.cuts else len(a)
        found, whole = nearest(dense, rank), float(dense.norm().double() ** 2)
    return _clamped(found, rank, method.clamp), (whole, float(found.values[:rank].square().sum()))


def _side_by_side(terms: Sequence[Term]) -> Block:
    """Return A [Σr, in] and B [out, Σr] of the sum; updates that share their A are added exactly, so equal ones cancel."""
    parts: list[Tensor] = []
    for number, term in enumerate(terms):
        own = term.weight * term.scaling * term.B.double()
        first = next((i for i, other in enumerate(terms[:number]) if torch.equal(other.A, term.A)), None)
        if first is not None:
            parts[first] = parts[first] + own
        parts.append(own if first is None else torch.zeros_like(own))
    return torch.cat([term.A.double() for term in terms]), torch.cat(parts, 1)


def _clamped(found: Decomposition, rank: int, clamp: float | None) -> Block:
    """Return A and B of this rank, their values clamped at a quantile of both, as PEFT does."""
    a, b = found.truncated(rank)
    if clamp is None:
        return a, b
    values = torch.cat([a.flatten(), b.flatten()]).sort().values
    position = clamp * (len(values) - 1)
    low = int(position)
    limit = torch.lerp(values[low], values[min(low + 1, len(values) - 1)], position - low).abs()
    return a.clamp(-limit, limit), b.clamp(-limit, limit)


def _bias(updates: Sequence[LayerUpdate], method: Method) -> Tensor | None:
    """Combine the biases of B in the same way, without a rank."""
    terms = [
        Term(update.weight, update.scaling, update.bias.detach()[None], update.bias.new_ones(1, 1))
        for update in updates
        if update.bias is not None
    ]
    return merged_update(terms, method.pruning)[0].to(terms[0].A) if terms else None
