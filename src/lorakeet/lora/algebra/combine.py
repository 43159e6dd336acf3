"""Combine several adapters into one: ΔW = Σ wᵢ·sᵢ·BᵢAᵢ, layer by layer.

- ``cat``: A and B are concatenated. Exact; the rank is the sum of the ranks.
- ``svd``: the nearest ΔW of a given rank (Eckart and Young 1936). ΔW is never formed: after QR decompositions of both
  sides of
  the concatenated pair, only a small square matrix is left to decompose.
- ``linear``: Σ √|wᵢsᵢ|·Aᵢ (with the sign) and Σ √|wᵢsᵢ|·Bᵢ. Ranks must be equal; the product has cross terms BᵢAⱼ.
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
from lorakeet.lora.embedding import LoraEmbedding
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.linear import LoraLinear

#: Values of ``combination_type``.
WAYS = ("svd", "cat", "linear")

Matrices = tuple[Tensor, Tensor]  # A [r, in] and B [out, r]


@dataclass(frozen=True)
class Combined:
    """A new adapter, with s = 1.

    Attributes:
        config: Its settings.
        matrices: Its A and B, by the name of the layer.
    """

    config: PeftConfig
    matrices: dict[str, Matrices]

    @torch.no_grad()
    def fill(self, model: Any, adapter: str) -> None:
        """Copy the matrices into the layers of the adapter, which was made from :attr:`config`."""
        for name, matrices in self.matrices.items():
            for own, value in zip(matrices_of(model.get_submodule(name), adapter), matrices, strict=True):
                own.zero_()
                own[: value.shape[0], : value.shape[1]] = value


def combine(model: Any, adapters: Sequence[str], weights: Sequence[float], way: str, rank: int | None) -> Combined:
    """Compute the adapter that :meth:`LoraModel.add_weighted_adapter` will add; changes nothing.

    Args:
        model: A model with the adapters.
        adapters: Their names.
        weights: One for each.
        way: One of :data:`WAYS`.
        rank: Of the new adapter, for ``svd``; None: the largest rank of the adapters.

    Raises:
        AdapterError: see :meth:`LoraModel.add_weighted_adapter`.
    """
    _check(model, adapters, weights, way)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and any(adapter in layer.r for adapter in adapters)
    }
    largest = max(layer.r[adapter] for layer in layers.values() for adapter in adapters if adapter in layer.r)
    matrices: dict[str, Matrices] = {}
    for name, layer in layers.items():
        if not isinstance(layer, (LoraLinear, LoraEmbedding)):
            raise AdapterError(
                f"{name} is a {type(layer).__name__}, whose adapters cannot be combined",
                "merge the adapters one after the other",
            )
        terms = [
            (weight * layer.scaling[adapter], *(matrix.detach() for matrix in matrices_of(layer, adapter)))
            for adapter, weight in zip(adapters, weights, strict=True)
            if adapter in layer.r
        ]
        matrices[name] = {"cat": _cat, "linear": _linear, "svd": lambda t: _svd(t, rank or largest)}[way](terms)
    return Combined(_combined_config(model.peft_config[adapters[0]], matrices), matrices)


def _combined_config(first: PeftConfig, matrices: dict[str, Matrices]) -> PeftConfig:
    """Return the first adapter's settings with the layers and ranks of ``matrices``, and s = 1."""
    r = max(a.shape[0] for a, _ in matrices.values())
    targets = {"target_modules": sorted(matrices), "exclude_modules": None}
    no_patterns: dict[str, Any] = {
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    new = {"r": r, "lora_alpha": r, "use_rslora": False, "lora_dropout": 0.0, **targets, **no_patterns}
    return first.model_copy(deep=True, update=new)


def matrices_of(layer: LoraLayer, adapter: str) -> Matrices:
    """Return the adapter's A [r, in] and B [out, r] in this layer."""
    if isinstance(layer, LoraEmbedding):
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    assert isinstance(layer, LoraLinear)
    a, b = layer.pair(adapter)
    return a.weight, b.weight


def _check(model: Any, adapters: Sequence[str], weights: Sequence[float], way: str) -> None:
    errors = []
    if not adapters or len(adapters) != len(weights):
        errors.append(f"got {len(adapters)} adapters and {len(weights)} weights, expected one weight for each adapter")
    if len(set(adapters)) < len(adapters):
        errors.append("an adapter is named twice")
    errors += [f"weight {weight} is not finite" for weight in weights if not math.isfinite(weight)]
    if way not in WAYS:
        errors.append(f"unknown combination_type {way!r}, expected one of {', '.join(WAYS)}")
    for adapter in adapters:
        config = model.peft_config[adapter]
        more = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "ensure_weight_tying")
        if named := [name for name in more if getattr(config, name)]:
            errors.append(f"adapter {adapter!r} has {', '.join(named)}, which cannot be combined")
        if not config.variant.additive:
            errors.append(f"adapter {adapter!r} is a {config.variant.name} adapter, which cannot be combined")
    if errors:
        raise AdapterError("; ".join(errors), did_you_mean(way, WAYS) if way not in WAYS else None)


def _cat(terms: Sequence[tuple[float, Tensor, Tensor]]) -> Matrices:
    return torch.cat([scale * a for scale, a, _ in terms]), torch.cat([b for _, _, b in terms], 1)


def _linear(terms: Sequence[tuple[float, Tensor, Tensor]]) -> Matrices:
    ranks = sorted({a.shape[0] for _, a, _ in terms})
    if len(ranks) > 1:
        raise AdapterError(f"combination_type='linear' needs equal ranks, got {ranks}", "use 'cat' or 'svd'")
    roots = [math.sqrt(abs(scale)) for scale, _, _ in terms]
    signed = [math.copysign(root, scale) for root, (scale, _, _) in zip(roots, terms, strict=True)]
    a = torch.stack([root * a for root, (_, a, _) in zip(signed, terms, strict=True)]).sum(0)
    return a, torch.stack([root * b for root, (_, _, b) in zip(roots, terms, strict=True)]).sum(0)


def _svd(terms: Sequence[tuple[float, Tensor, Tensor]], rank: int) -> Matrices:
    """Truncate B·A = Q_B (R_B R_Aᵀ) Q_Aᵀ; the small matrix in the middle has the singular values of the product."""
    a, b = _cat(terms)
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * (v[:rank] @ q_a.T)).to(a.dtype), ((q_b @ u[:, :rank]) * root).to(b.dtype)
