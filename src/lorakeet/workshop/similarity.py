"""Similarity of two adapters, layer by layer and from their files: angles of the updates, shared subspaces, interference.

With ΔWᵢ = UᵢΣᵢVᵢᵀ (:mod:`lorakeet.lora.algebra.decomposition`):

- cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖), where ⟨ΔW₁, ΔW₂⟩ = s₁s₂·Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ) is an [r₁, r₂] product.
- principal angles of the column and of the row spaces: the singular values of U₁ᵀU₂ and V₁ᵀV₂ are their cosines (Björck and
  Golub 1973). The overlap is the mean of the squared cosines, as in the LoRA paper's section 7.2 (Hu et al. 2021).
- shared energy: the share of ‖ΔW₁‖² in the other's column and row space, ‖U₂U₂ᵀ·ΔW₁·V₂V₂ᵀ‖² / ‖ΔW₁‖².
- interference: the share of entries whose signs differ, and the share of the magnitude that the sum cancels,
  1 - Σ|ΔW₁ + ΔW₂| / Σ(|ΔW₁| + |ΔW₂|). Only these look at entries of ΔW, a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.adapter.inspect import SavedLayer
from lorakeet.errors import AdapterError
from lorakeet.lora.algebra.blocks import split_blocks
from lorakeet.lora.algebra.decomposition import Decomposition, decompose
from lorakeet.lora.algebra.pruning import Term, row_ranges
from lorakeet.lora.targeting import layer_index
from lorakeet.workshop.pairing import AdapterFiles, read_adapters

#: Share of the largest singular value below which a direction does not count.
_DIRECTION = 1e-6
#: Figures of a layer that are averaged over the layers of one kind.
AVERAGED = ("cosine", "column_overlap", "row_overlap", "shared_energy", "sign_conflicts", "cancelled")


def similarity_report(one: str | Path, other: str | Path, *, allow_other_base: bool = False) -> dict[str, Any]:
    """Compare the updates of two adapters; reads their files only. Returns values for JSON.

    - ``adapters``, ``base_model``: names.
    - ``norms``, ``difference_norm``, ``cosine``: ‖ΔW‖ of each, ‖ΔW₁ - ΔW₂‖ and the cosine, over all layers together.
    - ``layers``: one entry for each layer that both adapt. ``column_angles`` and ``row_angles`` are in degrees, rising.
      ``chance`` has the overlaps that random subspaces would have, and ``shared_energy`` the share of each adapter in the
      other. A figure is None where an update is zero.
    - ``kinds``: means of these by the last part of the layer's name.
    - ``only_in``: names of the layers that one of them adapts alone, for each.

    Args:
        one: Folder or hub id.
        other: The same, of the other adapter.
        allow_other_base: Accept adapters of different bases.

    Raises:
        AdapterError: One cannot be read or is no plain sum, they are of different bases, or a layer has two shapes.
    """
    pair = read_adapters([one, other], allow_other_base=allow_other_base)
    for adapter in pair:
        if not adapter.config.variant.additive or adapter.config.variant.parameters:
            raise AdapterError(
                f"adapter {adapter.name!r} is {adapter.config.variant.name}, whose update needs the base",
                "compare it on data after a merge, or export it as plain LoRA",
            )
    first, second = pair
    common = sorted(first.layers.keys() & second.layers.keys())
    layers = [_layer(name, first.layers[name], second.layers[name], first) for name in common]
    squares = [sum(_norm(layer) ** 2 for layer in adapter.layers.values()) for adapter in pair]
    inner = sum(layer.pop("inner") for layer in layers)
    return {
        "adapters": [adapter.name for adapter in pair],
        "base_model": first.config.base_model_name_or_path,
        "norms": [math.sqrt(square) for square in squares],
        "difference_norm": math.sqrt(max(0.0, sum(squares) - 2 * inner)),
        "cosine": _ratio(inner, math.sqrt(squares[0] * squares[1])),
        "layers": layers,
        "kinds": _by_kind(layers),
        "only_in": [sorted(a.layers.keys() - b.layers.keys()) for a, b in (pair, pair[::-1])],
    }


def _terms(layer: SavedLayer) -> list[Term]:
    blocks = split_blocks(layer.tensors["A"], layer.tensors["B"], layer.rank)
    return [Term(1.0, layer.scaling, a.double(), b.double()) for a, b in blocks]


def inner_product(one: Term, other: Term) -> float:
    """Compute ⟨ΔW₁, ΔW₂⟩ = s₁s₂·Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ), without forming either."""
    return one.scaling * other.scaling * float(((one.B.T @ other.B) * (one.A @ other.A.T)).sum())


def _norm(layer: SavedLayer) -> float:
    return math.sqrt(max(0.0, sum(inner_product(term, term) for term in _terms(layer))))


def _layer(name: str, one: SavedLayer, other: SavedLayer, adapter: AdapterFiles) -> dict[str, Any]:
    """Return the figures of a layer; of several experts or groups those of all together, and means of the angles."""
    sides = _terms(one), _terms(other)
    shapes = [[(len(term.B), term.A.shape[1]) for term in terms] for terms in sides]
    if shapes[0] != shapes[1]:
        raise AdapterError(
            f"{name} is {shapes[0][0]} in one adapter and {shapes[1][0]} in the other", "take adapters of one base"
        )
    pairs = list(zip(*sides, strict=True))
    found = [(decompose(a.A, a.B, a.scaling), decompose(b.A, b.B, b.scaling)) for a, b in pairs]
    inner = sum(inner_product(*pair) for pair in pairs)
    norms = [math.sqrt(sum(float(two[side].values.square().sum()) for two in found)) for side in (0, 1)]
    spaces = [_subspaces(*two) for two in found]
    both = [space for space in spaces if space]
    return {
        "name": name,
        "kind": one.kind,
        "layer": layer_index(name, adapter.config),
        "inner": inner,
        "norms": norms,
        "cosine": _ratio(inner, norms[0] * norms[1]),
        **(_mean_of(both) if both else dict.fromkeys(("column_angles", "row_angles", *_OVERLAPS, "chance"))),
        "shared_energy": [_shared([two[::step] for two in found]) for step in (1, -1)],
        **_interference(pairs),
    }


#: Figures of subspaces that are numbers.
_OVERLAPS = ("column_overlap", "row_overlap")


def _directions(found: Decomposition) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases U [out, k] and V [in, k] of the column and the row space."""
    count = int((found.values > _DIRECTION * found.values[:1]).sum())
    return found.U[:, :count], found.V[:, :count]


def principal_angles(one: Tensor, other: Tensor) -> list[float]:
    """Return the principal angles of two subspaces in degrees, rising.

    Args:
        one: Orthonormal columns [n, k].
        other: Orthonormal columns [n, l].
    """
    cosines = torch.linalg.svdvals(one.T @ other).clamp(max=1.0)
    return torch.rad2deg(torch.arccos(cosines)).tolist()  # type: ignore[no-any-return]


def _subspaces(one: Decomposition, other: Decomposition) -> dict[str, Any] | None:
    """Return angles and overlaps of two updates; None if one of them is zero."""
    (U1, V1), (U2, V2) = _directions(one), _directions(other)
    if not U1.shape[1] or not U2.shape[1]:
        return None
    large = max(U1.shape[1], U2.shape[1])
    figures: dict[str, Any] = {"chance": [large / len(U1), large / len(V1)]}
    for side, (a, b) in (("column", (U1, U2)), ("row", (V1, V2))):
        figures[f"{side}_angles"] = angles = principal_angles(a, b)
        figures[f"{side}_overlap"] = sum(math.cos(math.radians(angle)) ** 2 for angle in angles) / len(angles)
    return figures


def _mean_of(spaces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the angles of the first matrix, and the mean overlaps of all."""
    means = {name: sum(space[name] for space in spaces) / len(spaces) for name in _OVERLAPS}
    return {**spaces[0], **means}


def _shared(sides: Sequence[Sequence[Decomposition]]) -> float | None:
    """Return the share of the first update's energy in the column and row space of the second."""
    kept = whole = 0.0
    for one, other in sides:
        U, V = _directions(other)
        kept += float((((U.T @ one.U) * one.values) @ (one.V.T @ V)).square().sum())
        whole += float(one.values.square().sum())
    return _ratio(kept, whole)


def _interference(pairs: Sequence[tuple[Term, Term]]) -> dict[str, float | None]:
    """Return the share of entries with different signs, and of the magnitude that the sum cancels."""
    conflicts = entries = 0
    magnitude = left = 0.0
    for one, other in pairs:
        for rows in row_ranges(one):
            a, b = one.rows(*rows), other.rows(*rows)
            signs = a.sign() * b.sign()
            conflicts, entries = conflicts + int((signs < 0).sum()), entries + int((signs != 0).sum())
            magnitude += float(a.abs().sum() + b.abs().sum())
            left += float((a + b).abs().sum())
    cancelled = None if not entries else 1 - left / magnitude
    return {"sign_conflicts": _ratio(conflicts, entries), "cancelled": cancelled}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _by_kind(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average the figures of layers by the last part of their names."""
    kinds = []
    for kind in sorted({layer["kind"] for layer in layers}):
        same = [layer for layer in layers if layer["kind"] == kind]
        means: dict[str, Any] = {"kind": kind, "layers": len(same)}
        for name in AVERAGED:
            values = [layer[name] for layer in same if layer[name] is not None]
            numbers = [n for value in values for n in (value if isinstance(value, list) else [value]) if n is not None]
            means[name] = sum(numbers) / len(numbers) if numbers else None
        chances = [chance for layer in same for chance in layer["chance"] or ()]
        means["chance"] = sum(chances) / len(chances) if chances else None
        kinds.append(means)
    return kinds
