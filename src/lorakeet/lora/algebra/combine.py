"""Combine adapters of a model into a new one, layer by layer; the methods are :mod:`.methods`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakeet.errors import AdapterError
from lorakeet.log import info
from lorakeet.lora.algebra.methods import CombinedLayer, LayerUpdate, Method, combine_layer
from lorakeet.lora.algebra.settings import with_ranks
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.embedding import LoraEmbedding
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.linear import LoraPair
from lorakeet.lora.target_parameters import LoraInProjection, LoraOutProjection, LoraParameter

#: Settings of an adapter that has more than an A and a B in each layer.
_MORE = ("modules_to_save", "trainable_token_indices", "ensure_weight_tying")


@dataclass(frozen=True)
class Combined:
    """A new adapter, with s = 1.

    Attributes:
        config: Its settings.
        layers: Its tensors, by the name of the layer.
    """

    config: PeftConfig
    layers: dict[str, CombinedLayer]

    @torch.no_grad()
    def fill(self, model: Any, adapter: str) -> None:
        """Copy the tensors into the layers of the adapter, which was made from :attr:`config`."""
        for name, combined in self.layers.items():
            layer = model.get_submodule(name)
            own = stored_update(layer, adapter, 1.0)
            own.A.copy_(combined.A)
            own.B.copy_(combined.B / own.scaling)  # not 1 in an attention's output projection
            if own.bias is not None:
                own.bias.copy_(0 * own.bias if combined.bias is None else combined.bias / own.scaling)


def combine(model: Any, adapters: Sequence[str], weights: Sequence[float], method: Method) -> Combined:
    """Compute the adapter that :meth:`LoraModel.add_weighted_adapter` will add; changes nothing.

    Args:
        model: A model with the adapters.
        adapters: Their names.
        weights: One for each.
        method: How to combine them.

    Raises:
        AdapterError: see :meth:`LoraModel.add_weighted_adapter`.
    """
    check_terms({adapter: model.peft_config[adapter] for adapter in adapters}, adapters, weights)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and any(adapter in layer.r for adapter in adapters)
    }
    if wrong := next((n for n, one in layers.items() if not isinstance(one, (LoraPair, LoraEmbedding))), None):
        raise AdapterError(
            f"{wrong} is a {type(layers[wrong]).__name__}, whose adapters cannot be combined",
            "merge the adapters one after the other",
        )
    largest = max(layer.r[adapter] for layer in layers.values() for adapter in adapters if adapter in layer.r)
    combined: dict[str, CombinedLayer] = {}
    for name, layer in layers.items():
        here = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.r]
        combined[name] = combine_layer([stored_update(layer, *one) for one in here], method, largest)
    log_energy([layer.energy_kept for layer in combined.values()], method)
    return Combined(_settings([model.peft_config[adapter] for adapter in adapters], layers, combined), combined)


def stored_update(layer: LoraLayer, adapter: str, weight: float) -> LayerUpdate:
    """Return the update of an adapter in a layer; its tensors are the layer's own."""
    if isinstance(layer, LoraEmbedding):
        a, b, bias = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], None
    else:
        assert isinstance(layer, LoraPair)
        first, second = layer.pair(adapter)
        a, b, bias = first.weight, second.weight, second.bias
    return LayerUpdate(weight, layer.scaling[adapter], layer.r[adapter], a, b, bias)


def log_energy(kept: Sequence[float], method: Method) -> None:
    """Log how much of the combination a lower rank leaves out."""
    if (method.cuts or method.prunes) and min(kept) < 1 - 1e-6:
        mean = sum(kept) / len(kept)
        info(
            f"{method.name} keeps {mean:.1%} of the energy of the combined update, at least {min(kept):.1%} of a layer"
        )


def check_terms(configs: Mapping[str, PeftConfig], adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Check that adapters can be combined with these weights.

    Args:
        configs: Settings of each adapter, by name.
        adapters: Their names as the user gave them.
        weights: One for each adapter.

    Raises:
        AdapterError: with all reasons.
    """
    errors = []
    if not adapters or len(adapters) != len(weights):
        errors.append(f"got {len(adapters)} adapters and {len(weights)} weights, expected one weight for each adapter")
    if len(set(adapters)) < len(adapters):
        errors.append("an adapter is named twice")
    errors += [f"weight {weight} is not finite" for weight in weights if not math.isfinite(weight)]
    for adapter, config in configs.items():
        more = [name for name in _MORE if getattr(config, name)] + (["bias"] if config.bias != "none" else [])
        if more:
            errors.append(f"adapter {adapter!r} has {', '.join(more)}, which cannot be combined")
        if not config.variant.additive or config.variant.parameters:
            errors.append(f"adapter {adapter!r} is a {config.variant.name} adapter, which cannot be combined")
    if any(c.lora_bias for c in configs.values()) and any(c.target_parameters for c in configs.values()):
        errors.append("one adapter has lora_bias and one has target_parameters, and no adapter can have both")
    if errors:
        raise AdapterError("; ".join(errors), "merge the adapters into the base one after the other")


def _settings(
    configs: Sequence[PeftConfig], layers: Mapping[str, LoraLayer], combined: Mapping[str, CombinedLayer]
) -> PeftConfig:
    """Return the first adapter's settings with all layers and their ranks, and s = 1."""
    ranks: dict[str, int] = {}
    modules: list[str] = []
    parameters: list[str] = []
    for name, layer in layers.items():
        owner = name.replace(".lora_parameters", "")
        if isinstance(layer, LoraOutProjection):
            continue  # adapted with its attention
        if isinstance(layer, LoraInProjection):
            owner = owner.rpartition(".")[0]
        (parameters if type(layer) is LoraParameter else modules).append(owner)
        ranks[owner] = combined[name].rank
    return combined_settings(configs, ranks, sorted(modules), sorted(parameters))


def combined_settings(
    configs: Sequence[PeftConfig], ranks: Mapping[str, int], modules: list[str], parameters: list[str]
) -> PeftConfig:
    """Return the settings of a combined adapter: plain LoRA on the layers of all.

    Args:
        configs: Settings of the adapters; most are taken from the first.
        ranks: The rank of each layer.
        modules: Names of the layers.
        parameters: Names of adapted parameters.
    """
    plain = type(configs[0]).from_dict({"peft_type": "LORA"})
    kept = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "fan_in_fan_out", "inference_mode")
    changes: dict[str, Any] = {name: getattr(configs[0], name) for name in kept}
    changes |= {"target_modules": modules, "target_parameters": parameters or None}
    changes["lora_bias"] = any(config.lora_bias for config in configs)
    return with_ranks(plain, ranks, **changes)
