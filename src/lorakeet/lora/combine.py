"""One adapter out of several: ΔW = Σ wᵢ·sᵢ·BᵢAᵢ, layer by layer.

- ``cat``: A and B side by side. Exact; the rank is the sum of all.
- ``svd``: the nearest ΔW of a given rank (Eckart and Young 1936), found without ever forming ΔW: a QR of each side of the
  concatenated pair leaves a small square matrix to decompose.
- ``linear``: √|wᵢsᵢ|·A (with the sign) and √|wᵢsᵢ|·B added up. Ranks must be equal; the product has cross terms BᵢAⱼ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import AdapterError, did_you_mean
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer import LoraEmbedding, LoraLayer, LoraLinear

WAYS = ("svd", "cat", "linear")

Pair = tuple[Tensor, Tensor]  # A [r, in] and B [out, r]


@dataclass(frozen=True)
class Combined:
    """Settings of the new adapter, scaled by 1, and what its pairs will hold, by the name of the layer."""

    config: PeftConfig
    pairs: dict[str, Pair]

    @torch.no_grad()
    def fill(self, model: Any, adapter: str) -> None:
        """Copy the pairs into the layers of the adapter, which was made from :attr:`config`."""
        for name, pair in self.pairs.items():
            for own, value in zip(pair_of(model.get_submodule(name), adapter), pair, strict=True):
                own.zero_()
                own[: value.shape[0], : value.shape[1]] = value


def combine(model: Any, adapters: Sequence[str], weights: Sequence[float], way: str, rank: int | None) -> Combined:
    """What :meth:`LoraModel.add_weighted_adapter` will add; changes nothing.

    Raises:
        AdapterError: see there.
    """
    _check(model, adapters, weights, way)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and any(adapter in layer.r for adapter in adapters)
    }
    largest = max(layer.r[adapter] for layer in layers.values() for adapter in adapters if adapter in layer.r)
    pairs: dict[str, Pair] = {}
    for name, layer in layers.items():
        if not isinstance(layer, (LoraLinear, LoraEmbedding)):
            raise AdapterError(f"{name} is a {type(layer).__name__}, whose pairs cannot be combined")
        terms = [
            (weight * layer.scaling[adapter], *(part.detach() for part in pair_of(layer, adapter)))
            for adapter, weight in zip(adapters, weights, strict=True)
            if adapter in layer.r
        ]
        pairs[name] = {"cat": _cat, "linear": _linear, "svd": lambda t: _svd(t, rank or largest)}[way](terms)
    r = max(a.shape[0] for a, _ in pairs.values())
    first = model.peft_config[adapters[0]]
    new = {
        "r": r,
        "lora_alpha": r,
        "target_modules": sorted(pairs),
        "exclude_modules": None,
        "layers_to_transform": None,
    }
    new |= {"layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_dropout": 0.0}
    return Combined(first.model_copy(deep=True, update=new), pairs)


def pair_of(layer: LoraLayer, adapter: str) -> Pair:
    """The adapter's A [r, in] and B [out, r] in this layer."""
    if isinstance(layer, LoraEmbedding):
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    assert isinstance(layer, LoraLinear)
    a, b = layer.pair(adapter)
    return a.weight, b.weight


def _check(model: Any, adapters: Sequence[str], weights: Sequence[float], way: str) -> None:
    complaints = []
    if not adapters or len(adapters) != len(weights):
        complaints.append(f"{len(adapters)} adapters and {len(weights)} weights, expected one weight for each adapter")
    if len(set(adapters)) < len(adapters):
        complaints.append("an adapter is named twice")
    complaints += [f"weight {weight} is not finite" for weight in weights if not math.isfinite(weight)]
    if way not in WAYS:
        complaints.append(f"combination_type={way!r} is not known, expected one of {', '.join(WAYS)}")
    for adapter in adapters:
        config = model.peft_config[adapter]
        more = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "ensure_weight_tying")
        if named := [name for name in more if getattr(config, name)]:
            complaints.append(f"adapter {adapter!r} has {', '.join(named)}, which have no weighted sum here")
    if complaints:
        raise AdapterError("; ".join(complaints), did_you_mean(way, WAYS) if way not in WAYS else None)


def _cat(terms: Sequence[tuple[float, Tensor, Tensor]]) -> Pair:
    return torch.cat([scale * a for scale, a, _ in terms]), torch.cat([b for _, _, b in terms], 1)


def _linear(terms: Sequence[tuple[float, Tensor, Tensor]]) -> Pair:
    ranks = sorted({a.shape[0] for _, a, _ in terms})
    if len(ranks) > 1:
        raise AdapterError(f"combination_type='linear' adds pairs of one rank, got {ranks}", "use 'cat' or 'svd'")
    roots = [math.sqrt(abs(scale)) for scale, _, _ in terms]
    signed = [math.copysign(root, scale) for root, (scale, _, _) in zip(roots, terms, strict=True)]
    a = torch.stack([root * a for root, (_, a, _) in zip(signed, terms, strict=True)]).sum(0)
    return a, torch.stack([root * b for root, (_, _, b) in zip(roots, terms, strict=True)]).sum(0)


def _svd(terms: Sequence[tuple[float, Tensor, Tensor]], rank: int) -> Pair:
    """B·A = Q_B (R_B R_Aᵀ) Q_Aᵀ; the singular values of the small middle are those of the whole."""
    a, b = _cat(terms)
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * (v[:rank] @ q_a.T)).to(a.dtype), ((q_b @ u[:, :rank]) * root).to(b.dtype)
