"""Names of layers from before a renaming in transformers, in an adapter's file and settings.

transformers renames the modules of an architecture now and then (the language model of Qwen2-VL was ``model.layers``, and is
``model.language_model.layers``). For checkpoints of a base it keeps a table of its renamings. The same table serves adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lorakeet.adapter.fingerprint import base_name
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.log import info
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.inject import OWN
from lorakeet.lora.targeting import matches, target_of


class CurrentNames:
    """The names that layers have in a model today, by those that they had in other releases of transformers."""

    def __init__(self, model: Any) -> None:
        own = [name for name in model.state_dict() if not any(mark in name for mark in OWN)]
        self.parameters = {base_name(name): True for name in own}
        self.layers = {name.rpartition(".")[0] for name in self.parameters}
        self.prefix = getattr(model, "base_model_prefix", None)
        steps = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
        self.renamings = [step for step in steps if isinstance(step, WeightRenaming)]

    def layer(self, name: str) -> str:
        """Return the name of a layer today; ``name`` itself if the model has it, or has no such layer."""
        if name in self.layers or not self.renamings:
            return name
        renamed, _ = rename_source_key(f"{name}.weight", self.renamings, [], self.prefix, self.parameters)
        found = renamed.removesuffix(".weight")
        return found if found in self.layers else name

    def parameter(self, name: str) -> str:
        """Return the name of a parameter of the base today."""
        path, _, leaf = name.rpartition(".")
        return f"{self.layer(path)}.{leaf}"

    def key(self, key: str) -> str:
        """Return the name of a tensor of an adapter's file today."""
        path, mark, part = key.removeprefix(PREFIX).partition(".lora_")
        if not mark:
            path, _, part = path.rpartition(".")
        inner = path.removesuffix(".base_layer").removesuffix(".token_adapter")
        return (
            key if (today := self.layer(inner)) == inner else f"{PREFIX}{today}{path[len(inner) :]}{mark or '.'}{part}"
        )


def with_current_names(
    model: Any, config: PeftConfig, tensors: Mapping[str, Tensor]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return the settings and tensors of an adapter with the names that its layers have in ``model`` today.

    Args:
        model: The base, with adapters or without.
        config: The adapter's settings.
        tensors: The tensors of its file.
    """
    names = CurrentNames(model)
    today = {key: names.key(key) for key in tensors}
    moved = {_layer(old): _layer(new) for old, new in today.items() if old != new}
    if not moved:
        return config, dict(tensors)
    old, new = next(iter(moved.items()))
    info(f"{len(moved)} layers of the adapter have other names in this release of transformers, {old} is now {new}")
    layers = {_layer(new): _layer(old) for old, new in today.items() if ".lora_" in old}
    return _with_layers(config, layers, names), {today[key]: tensor for key, tensor in tensors.items()}


def _layer(key: str) -> str:
    """Return the layer that a tensor of an adapter's file belongs to."""
    path, mark, _ = key.removeprefix(PREFIX).partition(".lora_")
    return path if mark else path.rpartition(".")[0]


def _with_layers(config: PeftConfig, layers: Mapping[str, str], names: CurrentNames) -> PeftConfig:
    """Return settings that mean these layers (new name -> old), with the rank and α that the old names had."""
    wanted: Any = config.target_modules
    if not _means(wanted, layers, names):
        wanted = sorted(layers)
    changes: dict[str, Any] = {"target_modules": wanted}
    for setting, value in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
        patterns = dict(getattr(config, setting))
        for new, old in layers.items():
            if (own := getattr(target_of(old, config), value)) != getattr(target_of(new, config), value):
                patterns = {new.replace(".", r"\."): own, **patterns}
        changes[setting] = patterns
    return config.model_copy(update=changes)


def _means(wanted: list[str] | str | None, layers: Iterable[str], names: CurrentNames) -> bool:
    """Whether ``target_modules`` matches just these layers of the model."""
    return wanted is not None and {name for name in names.layers if name and matches(name, wanted)} == set(layers)
