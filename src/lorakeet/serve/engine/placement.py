"""Adapters put on a served model while it answers: prepared beside it, then attached between two steps.

LoRA and DoRA on linear layers are made ready while steps run, with the norms of DoRA. So are modules that were trained whole.
To attach them takes a few entries in tables of each layer. A forward pass with a copy of its own does without that. Other
adapters (embeddings, experts, other variants) are put on the model between two steps as anywhere else. That takes a second
or so, for which answers pause.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakeet.adapter.fingerprint import agree, fingerprint
from lorakeet.adapter.older_names import CurrentNames, with_current_names
from lorakeet.adapter.put_adapter import put_adapter
from lorakeet.adapter.serialization import check_base
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.errors import AdapterError
from lorakeet.kernels.decoder_step import Update
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.default_targets import resolve_config
from lorakeet.lora.initialization.taken_part import holds_parts, takes_part
from lorakeet.lora.inject import InjectionPlan, plan_injection, replace_module
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.layer_types import layer_class, unwrapped
from lorakeet.lora.lifecycle.rollback import all_or_nothing
from lorakeet.lora.linear import LoraLinear
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.targeting import Target, target_of
from lorakeet.lora.variants.dora import MAGNITUDE, Dora
from lorakeet.lora.variants.lora import Lora
from lorakeet.lora.variants.magnitude import Magnitude
from lorakeet.lora.variants.variant import Variant
from lorakeet.serve.engine.adapter_files import AdapterFiles, differences

#: Settings that say how large and how scaled an update is, or where it comes from, and not which layers have one.
_NOT_TARGETING = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "init_lora_weights"),
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
}
#: Types of modules that stand in place of the base's own.
_ADAPTED = (LoraLayer, SavedModule)
#: Ends of the keys of A and B of a linear layer.
_PAIR = (".lora_A.weight", ".lora_B.weight")


class _Places(NamedTuple):
    """Places of an adapter in the model.

    Attributes:
        layers: Linear layers with an update, and the shape of each, (out, in).
        saved: Modules that are trained whole.
    """

    layers: Mapping[str, tuple[int, int]]
    saved: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """An adapter that fits the model.

    Attributes:
        slot: The name that it will have in the model.
        files: Its files.
        config: Its settings, with the names that layers have today.
        tensors: Its tensors, with these names.
        variant: Its variant.
        scale: Factor of its update.
        targets: Linear layers with an update, by name; None for an adapter that is more than these and whole modules.
        saved: Modules that were trained whole, each around the base's own, by place.
    """

    slot: str
    files: AdapterFiles
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    variant: Variant
    scale: float
    targets: Mapping[str, Target] | None = None
    saved: Mapping[str, SavedModule] = field(default_factory=dict)

    @property
    def layers(self) -> Sequence[str] | None:
        """The layers with an update; None for an adapter that is more than linear layers."""
        return None if self.targets is None or self.saved else list(self.targets)


class Placement:
    """The places for adapters on one model. What only the base decides is found out once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base = fingerprint(model)
        self._names = CurrentNames(model)
        self._places: dict[str, _Places | None] = {}  # by targeting settings; None: other places than linear layers

    # -- while steps run --------------------------------------------------------------------------------------------

    def prepare(self, slot: str, files: AdapterFiles, scale: float = 1.0) -> Prepared:
        """Check an adapter against the model; reads the model, and changes nothing.

        Args:
            slot: The name that it will have in the model.
            files: Its files.
            scale: Factor of its update.

        Raises:
            AdapterError: It was trained on another base, or its tensors do not fit.
            TargetError: Its layers are not in this model.
        """
        noted = (files.notes.get("base") or {}).get("fingerprint")
        if noted and not agree(noted, self.base):
            check_base(files.source, files.notes, self.model)
        config, tensors = files.config, dict(files.tensors)
        if any(_layer(key) not in self._names.layers for key in tensors):
            config, tensors = with_current_names(self.model, config, tensors)
        variant = config.variant
        unknown = Prepared(slot, files, config, tensors, variant, scale)
        places = self._places_of(config) if _is_known(config, variant) else None
        if places is None or not self._are_free(places):
            return unknown
        targets = {name: target_of(name, config) for name in places.layers}
        saved = {name: self._saved_part(slot, name) for name in places.saved}
        copies = {name: module.modules_to_save[slot] for name, module in saved.items()}
        found = differences(_shapes(places, targets, variant, copies), tensors, files.is_finite)
        if found.unexpected:
            return unknown  # the usual way knows more, or says it better
        found.raise_if_any(files.source)
        _fill(copies, tensors)
        return Prepared(slot, files, config, tensors, variant, scale, targets, saved)

    def update(self, prepared: Prepared, name: str) -> Update | None:
        """Return the update of a linear layer as compiled loops compute it; None for one that they cannot.

        Args:
            prepared: The adapter.
            name: The layer.
        """
        assert prepared.targets is not None
        target, variant = prepared.targets[name], prepared.variant
        if type(variant) is not Lora or self.model.training:
            return self._linear_part(prepared, target).decoder_update(prepared.slot)
        a, b = (prepared.tensors[f"{PREFIX}{name}{end}"].float() for end in _PAIR)
        return Update(a, b, prepared.scale * variant.scaling(prepared.config, target.r, target.alpha))

    def parts(self, prepared: Prepared) -> dict[str, LoraLinear | SavedModule] | None:
        """Return an adapter's layers and modules, each around the base's, by place; None for one that is more than these."""
        if prepared.targets is None:
            return None
        layers = {name: self._linear_part(prepared, target) for name, target in prepared.targets.items()}
        return {**layers, **prepared.saved}

    def _places_of(self, config: PeftConfig) -> _Places | None:
        """Return the places that the settings mean; None where they mean others than linear layers and whole modules."""
        chosen = {key: value for key, value in config.to_dict().items() if key not in _NOT_TARGETING}
        key = json.dumps(chosen, sort_keys=True, default=str)
        if key not in self._places:
            plan = plan_injection(self.model, resolve_config(self.model, config, fresh=False), strict=False)
            self._places[key] = self._linear_places(plan)
        return self._places[key]

    def _linear_places(self, plan: InjectionPlan) -> _Places | None:
        if not self._is_linear(plan):
            return None
        layers: dict[str, Any] = {one.name: unwrapped(self.model.get_submodule(one.name)) for one in plan.targets}
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        return _Places(shapes, tuple(plan.saved))

    def _is_linear(self, plan: InjectionPlan) -> bool:
        """Whether a plan has linear layers and whole modules only."""
        if plan.tokens or plan.tied or any(target.parameter for target in plan.targets):
            return False
        modules = [self.model.get_submodule(target.name) for target in plan.targets]
        return all(layer_class(unwrapped(module)) is LoraLinear for module in modules)

    def _are_free(self, places: _Places) -> bool:
        """Whether no other adapter uses a place in another way."""
        if not self.model.lora_parts():
            return True
        layers = [self.model.get_submodule(name) for name in places.layers]
        saved = [self.model.get_submodule(name) for name in places.saved]
        return not any(isinstance(one, _ADAPTED) and type(one) is not LoraLinear for one in layers) and not any(
            isinstance(one, _ADAPTED) and type(one) is not SavedModule for one in saved
        )

    def _linear_part(self, prepared: Prepared, target: Target) -> LoraLinear:
        """Return a layer around the base's own with the adapter alone."""
        slot, config, tensors = prepared.slot, prepared.config, prepared.tensors
        layer = LoraLinear(unwrapped(self.model.get_submodule(target.name)), self.model.switch)
        layer.leaf = target.name.rpartition(".")[2]
        layer.train(self.model.training)
        weight = layer.base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32

        def own(end: str) -> Tensor:
            return tensors[f"{PREFIX}{target.name}{end}"].to(weight.device, dtype).contiguous()

        a, b = (_linear(own(end)) for end in _PAIR)
        layer.attach(slot, config, target.r, target.alpha, a, b)
        layer.set_scale(slot, prepared.scale)
        if isinstance(prepared.variant, Dora):
            magnitude = Magnitude(layer, slot).requires_grad_(False)  # computes the norms, and keeps them
            magnitude.weight.data = own(f".{MAGNITUDE}").view_as(magnitude.weight)
            layer.add_part(MAGNITUDE, slot, magnitude)
        return layer

    def _saved_part(self, slot: str, name: str) -> SavedModule:
        """Return a module around the base's own with a copy for the adapter, which has the base's values so far."""
        module = SavedModule(_original(self.model.get_submodule(name)), self.model.switch)
        module.add_adapter(slot)
        module.set_trainable(slot, False)
        return module.train(self.model.training)

    # -- between two steps ------------------------------------------------------------------------------------------

    def put(self, prepared: Prepared, parts: Mapping[str, LoraLinear | SavedModule] | None) -> None:
        """Put an adapter on the model, all or nothing.

        Args:
            prepared: The adapter.
            parts: Its :meth:`parts`.

        Raises:
            AdapterError: It would change what others use.
        """
        slot = prepared.slot
        if parts is not None:
            self._attach(slot, prepared.config, parts)
            return
        source = prepared.files.source
        with all_or_nothing(self.model):
            put_adapter(self.model, slot, prepared.config, prepared.tensors, source, allow_new_base=False)
            if holds_parts(self.model, slot):
                raise AdapterError(
                    f"adapter {source!r} took a part of the base's weights, which others use too",
                    "save it with plain_lora=True, and serve that",
                )
        for layer in self.model.lora_layers():
            layer.set_scale(slot, prepared.scale)

    def _attach(self, slot: str, config: PeftConfig, parts: Mapping[str, LoraLinear | SavedModule]) -> None:
        """Put the parts at their places; where another adapter has a part already, they join it."""
        model = self.model
        for name, part in parts.items():
            there = model.get_submodule(name)
            if isinstance(there, type(part)):
                _join(there, part, slot)
            else:
                replace_module(model, name, part)
                model._parts.append(part)
        model.peft_config[slot] = config.model_copy(update={"inference_mode": True})

    def remove(self, slots: Sequence[str]) -> None:
        """Take adapters off the model."""
        for slot in slots:
            if slot in self.model.peft_config:
                self.model.remove_parts(slot)
                del self.model.peft_config[slot]


def _is_known(config: PeftConfig, variant: Variant) -> bool:
    """Whether the settings are those of LoRA or DoRA on layers, and of whole modules."""
    if not isinstance(variant, (Lora, Dora)) or config.lora_bias or config.target_parameters:
        return False
    if config.trainable_token_indices is not None:
        return False
    return not (isinstance(config.init_lora_weights, str) and takes_part(config.init_lora_weights))


def _shapes(
    places: _Places, targets: Mapping[str, Target], variant: Variant, copies: Mapping[str, nn.Module]
) -> dict[str, list[int]]:
    """Return the shape of each tensor that an adapter's file must have, by key.

    Args:
        places: Its places.
        targets: Name, rank and α of its layers.
        variant: Its variant.
        copies: Its own copies of modules, by place.
    """
    expected: dict[str, list[int]] = {}
    for name, (out, inner) in places.layers.items():
        expected[f"{PREFIX}{name}.lora_A.weight"] = [targets[name].r, inner]
        expected[f"{PREFIX}{name}.lora_B.weight"] = [out, targets[name].r]
        for own in variant.parameters:
            expected[f"{PREFIX}{name}.{own}"] = [out]
    for name, module in copies.items():
        for key, parameter in module.named_parameters():
            expected[f"{PREFIX}{name}.{key}"] = list(parameter.shape)
    return expected


def _original(module: nn.Module) -> nn.Module:
    """Return the base's own module at a place."""
    return module.original_module if isinstance(module, SavedModule) else module


@torch.no_grad()
def _fill(copies: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter's tensors into its modules."""
    for name, module in copies.items():
        for key, parameter in module.named_parameters():
            parameter.copy_(tensors[f"{PREFIX}{name}.{key}"])


def _join(there: nn.Module, part: nn.Module, slot: str) -> None:
    """Move an adapter's entries from the tables of one part to those of another of the same type."""
    for name, table in vars(part).items():
        if isinstance(table, set) and slot in table:
            getattr(there, name).add(slot)
        elif isinstance(table, dict) and slot in table:
            getattr(there, name)[slot] = table[slot]
    for name, module in part.named_children():
        if isinstance(module, nn.ModuleDict) and slot in module:
            if name not in there._modules:
                there.add_module(name, nn.ModuleDict())
            there.get_submodule(name)[slot] = module[slot]  # type: ignore[operator, index]


def _layer(key: str) -> str:
    """Return the layer that a key of the file belongs to."""
    path, mark, _ = key.removeprefix(PREFIX).partition(".lora_")
    return path if mark else path.rpartition(".")[0]


def _linear(weight: Tensor) -> nn.Linear:
    """Return a frozen linear layer with this weight, [out, in]; its constructor would draw random values first."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", None)
    layer.training = False
    return layer
