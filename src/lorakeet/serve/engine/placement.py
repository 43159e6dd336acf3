"""Adapters put on a served model while it answers: prepared beside it, then attached between two steps.

Plain LoRA on linear layers, the usual adapter, is made ready while steps run. To attach it takes a few entries in tables of
each layer. Other adapters (DoRA, trained heads, embeddings) are put on the model between two steps as anywhere else. That
takes a second or so, for which answers pause.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.adapter.fingerprint import agree, fingerprint
from lorakeet.adapter.older_names import CurrentNames, with_current_names
from lorakeet.adapter.put_adapter import put_adapter
from lorakeet.adapter.serialization import check_base
from lorakeet.adapter.tensor_checks import Differences, nonfinite_error
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.errors import AdapterError
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.default_targets import TASK_HEADS, resolve_config
from lorakeet.lora.initialization.taken_part import holds_parts, takes_part
from lorakeet.lora.inject import InjectionPlan, plan_injection, replace_module
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.layer_types import layer_class, unwrapped
from lorakeet.lora.lifecycle.rollback import all_or_nothing
from lorakeet.lora.linear import LoraLinear
from lorakeet.lora.targeting import Target, target_of
from lorakeet.serve.engine.adapter_files import AdapterFiles

#: Settings that say how large and how scaled an update is, or where it comes from, and not which layers have one.
_NOT_TARGETING = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "init_lora_weights"),
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
}
#: Ends of the keys of plain LoRA on a linear layer.
_PLAIN = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class _Part:
    """A layer of plain LoRA with its A and B.

    Attributes:
        target: Name, rank and α.
        layer: The LoRA layer in the model, or a new one around the layer that is there.
        a: A [r, in].
        b: B [out, r].
    """

    target: Target
    layer: LoraLinear
    a: nn.Linear
    b: nn.Linear


@dataclass(frozen=True)
class Prepared:
    """An adapter that fits the model, ready to be put on it.

    Attributes:
        files: Its files.
        config: Its settings, with the names that layers have today.
        tensors: Its tensors, with these names.
        parts: Its part in each layer; None for an adapter that is more than plain LoRA.
    """

    files: AdapterFiles
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    parts: list[_Part] | None


class Placement:
    """The places for adapters on one model. What only the base decides is found out once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base = fingerprint(model)
        self._names = CurrentNames(model)
        self._plans: dict[str, tuple[str, ...] | None] = {}  # targeting settings -> layers; None: more than plain LoRA

    # -- while steps run --------------------------------------------------------------------------------------------

    def prepare(self, files: AdapterFiles) -> Prepared:
        """Check an adapter against the model and make it ready; reads the model, and changes nothing.

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
        names = self._layers(config) if _is_plain(config, tensors) else None
        if names is None:
            return Prepared(files, config, tensors, None)
        targets = [target_of(name, config) for name in names]
        self._differences(targets, tensors).raise_if_any(files.source)
        layers = [self._layer(name) for name in names]
        if any(type(layer) is not LoraLinear for layer in layers):  # adapted by another adapter in another way
            return Prepared(files, config, tensors, None)
        parts = [self._part(target, layer, tensors) for target, layer in zip(targets, layers, strict=True)]
        return Prepared(files, config, tensors, parts)

    def _layers(self, config: PeftConfig) -> tuple[str, ...] | None:
        """Return the linear layers that the settings mean; None where they mean more than those."""
        chosen = {key: value for key, value in config.to_dict().items() if key not in _NOT_TARGETING}
        key = json.dumps(chosen, sort_keys=True, default=str)
        if key not in self._plans:
            plan = plan_injection(self.model, resolve_config(self.model, config, fresh=False), strict=False)
            self._plans[key] = tuple(target.name for target in plan.targets) if self._is_linear(plan) else None
        return self._plans[key]

    def _is_linear(self, plan: InjectionPlan) -> bool:
        """Whether a plan has linear layers only."""
        if plan.saved or plan.tokens or plan.tied or any(target.parameter for target in plan.targets):
            return False
        modules = [self.model.get_submodule(target.name) for target in plan.targets]
        return all(layer_class(unwrapped(module)) is LoraLinear for module in modules)

    def _differences(self, targets: list[Target], tensors: Mapping[str, Tensor]) -> Differences:
        """Compare the tensors with those that the layers expect."""
        expected: dict[str, list[int]] = {}
        for target in targets:
            layer: Any = unwrapped(self.model.get_submodule(target.name))
            expected[f"{PREFIX}{target.name}.lora_A.weight"] = [target.r, layer.in_features]
            expected[f"{PREFIX}{target.name}.lora_B.weight"] = [layer.out_features, target.r]
        shapes = [
            f"{key} is {list(tensors[key].shape)}, expected {shape}"
            for key, shape in expected.items()
            if key in tensors and list(tensors[key].shape) != shape
        ]
        return Differences(
            {},
            tuple(sorted(expected.keys() - tensors.keys())),
            tuple(sorted(tensors.keys() - expected.keys())),
            tuple(shapes),
            nonfinite=nonfinite_error(tensors),
        )

    def _layer(self, name: str) -> Any:
        """Return the LoRA layer at a place, or a new one that is not there yet."""
        module = self.model.get_submodule(name)
        if isinstance(module, LoraLayer):
            return module
        layer = LoraLinear(module, self.model.switch)
        layer.leaf = name.rpartition(".")[2]
        return layer.train(self.model.training)

    def _part(self, target: Target, layer: LoraLinear, tensors: Mapping[str, Tensor]) -> _Part:
        """Make a layer's A and B."""
        weight = layer.base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a, b = (_linear(tensors[f"{PREFIX}{target.name}{end}"].to(weight.device, dtype).contiguous()) for end in _PLAIN)
        return _Part(target, layer, a, b)

    # -- between two steps ------------------------------------------------------------------------------------------

    def put(self, slot: str, prepared: Prepared) -> None:
        """Put an adapter on the model under the name ``slot``; all or nothing.

        Raises:
            AdapterError: It would change what others use.
        """
        if prepared.parts is not None:
            self._attach(slot, prepared.config, prepared.parts)
            return
        source = prepared.files.source
        with all_or_nothing(self.model):
            put_adapter(self.model, slot, prepared.config, prepared.tensors, source, allow_new_base=False)
            if holds_parts(self.model, slot):
                raise AdapterError(
                    f"adapter {source!r} took a part of the base's weights, which others use too",
                    "save it with plain_lora=True, and serve that",
                )

    def _attach(self, slot: str, config: PeftConfig, parts: list[_Part]) -> None:
        """Attach A and B to each layer."""
        model = self.model
        for part in parts:
            part.layer.attach(slot, config, part.target.r, part.target.alpha, part.a, part.b)
            if model.get_submodule(part.target.name) is not part.layer:
                replace_module(model, part.target.name, part.layer)
                model._parts.append(part.layer)
        model.peft_config[slot] = config.model_copy(update={"inference_mode": True})

    def remove(self, slot: str) -> None:
        """Take an adapter off the model."""
        if slot in self.model.peft_config:
            self.model.remove_parts(slot)
            del self.model.peft_config[slot]


def _is_plain(config: PeftConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether settings and tensors are those of plain LoRA on layers."""
    if config.variant.name != "LoRA" or config.lora_bias or config.modules_to_save or config.target_parameters:
        return False
    if config.trainable_token_indices is not None or TASK_HEADS.get(config.task_type or ""):
        return False
    if isinstance(config.init_lora_weights, str) and takes_part(config.init_lora_weights):
        return False
    return all(key.endswith(_PLAIN) for key in tensors)


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
