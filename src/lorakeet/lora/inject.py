"""Choosing layers is a plan; putting LoRA on them is an act.

:func:`plan_injection` reads names and shapes only, so it runs on the meta device, and it raises before anything is touched.
:func:`inject` then replaces exactly what the plan names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from lorakeet.errors import TargetError, nearest
from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.default_targets import TASK_HEADS, resolve_targets
from lorakeet.lora.layer import ActiveAdapters, LoraLayer
from lorakeet.lora.layer_types import ADAPTABLE, adaptable, inside_adapter, layer_class, unwrapped
from lorakeet.lora.modules_to_save import SavedModule, share_copy
from lorakeet.lora.target_parameters import LoraParameter
from lorakeet.lora.targeting import (
    ALL_LINEAR,
    Target,
    excluded,
    layer_index,
    layer_indices,
    layer_wanted,
    matches,
    planned,
)
from lorakeet.lora.trainable_tokens import TiedLayer, TrainableTokens
from lorakeet.lora.weight_tying import tie, trained_tokens

Part = LoraLayer | SavedModule
L = TypeVar("L", bound=LoraLayer)
#: What stands in the names of an adapter's own parameters.
OWN = (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")


@dataclass(frozen=True)
class Plan:
    """Which layers and parameters get a low-rank pair, and which modules are trained whole."""

    targets: tuple[Target, ...]
    saved: tuple[str, ...]
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()  # layers of which single rows are trained
    tied: tuple[tuple[str, str], ...] = ()  # layers that do as the embedding does whose weight they share

    def describe(self) -> str:
        """For example ``60 layers (30 q_proj, 30 v_proj), rank 16``."""
        parts = []
        for word in ("layers", "parameters"):
            leaves = [t.name.rpartition(".")[2] for t in self.targets if t.parameter == (word == "parameters")]
            kinds = ", ".join(f"{leaves.count(leaf)} {leaf}" for leaf in sorted(set(leaves)))
            parts += [f"{len(leaves)} {word} ({kinds})"] if leaves else []
        ranks = sorted({target.r for target in self.targets})
        text = f"{' and '.join(parts) or '0 layers'}, rank {', '.join(map(str, ranks))}"
        text += f"; trained whole: {', '.join(self.saved)}" if self.saved else ""
        text += "".join(f"; {len(tokens)} tokens of {name}" for name, tokens in self.tokens)
        return text + (f"; tied: {', '.join(name for name, _ in self.tied)}" if self.tied else "")


def plan_injection(model: nn.Module, config: PeftConfig, *, strict: bool = True) -> Plan:
    """The layers that ``config`` means on ``model``; reads no weights and changes nothing.

    Args:
        model: Any module, on any device, meta included.
        config: ``target_modules`` must be resolved or left out (see :func:`resolve_targets`).
        strict: A name that matches nothing is an error; off when an artefact's own tensors decide.

    Raises:
        TargetError: nothing matches, a part of what was named matches nothing, or a match cannot be adapted.
    """
    modules = {name: module for name, module in model.named_modules() if not inside_adapter(model, name)}
    wanted = resolve_targets(model, config)
    matched = [name for name in modules if name and matches(name, wanted) and not excluded(name, config)]
    complaints: list[str] = []
    if strict:
        complaints += _unmatched("target_modules", wanted, modules)
        complaints += _unmatched("exclude_modules", config.exclude_modules, modules)
    chosen = [name for name in matched if layer_wanted(name, config)]
    usable = [name for name in chosen if adaptable(modules[name])]
    complaints += [
        f"{name!r} is a {type(unwrapped(modules[name])).__name__}, which LoRA cannot adapt (it adapts {ADAPTABLE})"
        for name in chosen
        if name not in usable
    ][:5]
    complaints += [f"{name!r} {why}" for name in usable if (why := _unfit(name, modules, config))][:5]
    parameters = _parameters(config, modules, usable, complaints, strict)
    if strict and not complaints:
        complaints += _partial(config, [*usable, *parameters], modules)
    saved = _saved_names(config, modules, complaints if strict else [])
    tokens = trained_tokens(model, config, modules, [*usable, *saved], complaints)
    layers, saved, tied = tie(model, config, modules, usable, saved, tokens, complaints)
    if not layers and not parameters and not tokens and not complaints and (strict or not saved):
        complaints.append(f"target_modules={_shown(wanted)} match no layer")
    if complaints:
        raise TargetError("; ".join(complaints), _hint(wanted, modules, config))
    _warn_of_gaps(layers, modules, config)
    targets = [planned(name, config) for name in layers]
    targets += [replace(planned(name, config), parameter=True) for name in parameters]
    rows = tuple((name, tuple(numbers)) for name, numbers in tokens.items())
    return Plan(tuple(targets), saved, rows, tied)


def _unfit(name: str, modules: dict[str, nn.Module], config: PeftConfig) -> str | None:
    """Why the layer, though of a kind that LoRA adapts, cannot be adapted as the settings say."""
    if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "belongs to nn.MultiheadAttention, which reads its weight and would pass LoRA by"
    base = unwrapped(modules[name])
    if "lora_parameters" in base._modules:
        return "has a parameter that another adapter's target_parameters adapt"
    kind = layer_class(base)
    assert kind is not None
    if isinstance(modules[name], LoraLayer) and type(modules[name]) is not kind:
        return "is adapted by another adapter in another way (tied, or single tokens)"
    return kind.complaint(base, config, planned(name, config).r)


def _parameters(
    config: PeftConfig, modules: dict[str, nn.Module], layers: list[str], complaints: list[str], strict: bool
) -> list[str]:
    """Full names of what ``target_parameters`` mean. As in PEFT, the settings that choose among layers have no say."""
    wanted = config.target_parameters or []
    all_parameters = {
        f"{path}.{name}": parameter
        for path, module in modules.items()
        for name, parameter in unwrapped(module)._parameters.items()
        if parameter is not None
    }
    found = {name: parameter for name, parameter in all_parameters.items() if matches(name, wanted)}
    if strict:
        missing = [key for key in wanted if not any(matches(name, [key]) for name in found)]
        complaints += [f"target_parameters {key!r} matches no parameter of this model" for key in missing]
    for name, parameter in found.items():
        owner = name.rpartition(".")[0]
        if owner in layers or isinstance(modules[owner], LoraLayer):
            complaints.append(f"{name!r} belongs to a layer that target_modules adapt already")
        elif not owner:
            complaints.append(f"{name!r} is a parameter of the model itself, for which the file format has no name")
        elif parameter.ndim not in (2, 3) or not parameter.is_floating_point():
            complaints.append(
                f"{name!r} is {parameter.dtype} {list(parameter.shape)}, expected a floating [out, in] or "
                "[experts, out, in]"
            )
    if found and layer_indices(config):
        warn(
            "layers_to_transform chooses among target_modules only; name single parameters in full to choose among them"
        )
    return list(found)


def inject(model: nn.Module, what: Plan, config: PeftConfig, adapter: str, switch: ActiveAdapters) -> list[Part]:
    """Put the adapter on every layer of the plan, in place; returns the layers and modules it now has a part in.

    A layer that already is a LoRA layer gets a further pair; the base layer below is the same object in all cases.
    """
    touched: list[Part] = []
    for target in what.targets:
        layer = _adapted(model, target, switch)
        layer.add_adapter(adapter, config, target.r, target.alpha)
        touched.append(layer)
    for name in what.saved:
        module = model.get_submodule(name)
        if not isinstance(module, SavedModule):
            module = SavedModule(module, switch)
            _replace(model, name, module)
        module.add_adapter(adapter)
        touched.append(module)
    for name, tokens in what.tokens:
        rows = _wrapped(model, name, TrainableTokens, switch)
        rows.add_tokens(adapter, tokens)
        touched.append(rows)
    for name, source in what.tied:
        first = model.get_submodule(source)
        if isinstance(first, SavedModule):
            share_copy(model.get_submodule(name), first, adapter)
            continue
        follower = _wrapped(model, name, TiedLayer, switch, first)
        follower.follow(adapter)
        touched.append(follower)
    return touched


def _wrapped(model: nn.Module, name: str, kind: type[L], *args: Any) -> L:
    """The layer of this kind at ``name``, made and put there if there is none yet."""
    layer = model.get_submodule(name)
    if not isinstance(layer, kind):
        layer = kind(layer, *args)
        _replace(model, name, layer)
    return layer


def _adapted(model: nn.Module, target: Target, switch: ActiveAdapters) -> LoraLayer:
    """The LoRA layer of the target, made and put in its place if there is none yet."""
    if target.parameter:
        owner, _, name = target.name.rpartition(".")
        return LoraParameter.on(model.get_submodule(owner), name, switch)
    layer = model.get_submodule(target.name)
    if isinstance(layer, LoraLayer):
        return layer
    kind = layer_class(layer)
    assert kind is not None, f"{target.name} passed the plan"
    made = kind(layer, switch)
    _replace(model, target.name, made)
    return made


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def restore(model: nn.Module) -> None:
    """Put every base layer back where it was: the inverse of all injections, whatever the adapters."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraParameter):
            module.release()
        elif isinstance(module, LoraLayer):
            _replace(model, name, module.base_layer)
        elif isinstance(module, SavedModule):
            _replace(model, name, module.original_module)


def _saved_names(config: PeftConfig, modules: dict[str, nn.Module], complaints: list[str]) -> tuple[str, ...]:
    names: list[str] = []
    for key in config.modules_to_save or ():
        found = [name for name in modules if name and matches(name, [key])]
        if not found and key not in TASK_HEADS.get(config.task_type or "", []):
            close = nearest(key, {name.rpartition(".")[2] for name in modules if name})
            complaints.append(
                f"modules_to_save names {key!r}, which the model has not (near: {', '.join(close) or 'none'})"
            )
        names += found
    return tuple(dict.fromkeys(names))


# -- complaints -----------------------------------------------------------------------------------------------------


def _shown(wanted: list[str] | str) -> str:
    return repr(wanted) if isinstance(wanted, str) else "[" + ", ".join(map(repr, wanted[:6])) + "]"


def _unmatched(setting: str, wanted: list[str] | str | None, modules: dict[str, nn.Module]) -> list[str]:
    """One complaint for each entry of a list (or the one regex) that no module matches."""
    entries = [wanted] if isinstance(wanted, str) else [[entry] for entry in wanted or ()]
    return [
        f"{setting} {_shown(entry)} matches nothing in this model"
        for entry in entries
        if not any(name and matches(name, entry) for name in modules)
    ]


def _partial(config: PeftConfig, usable: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """Layer numbers that do not exist and patterns that name no adapted layer."""
    said = []
    present = {layer_index(name, config) for name in modules} - {None}
    if missing := [index for index in layer_indices(config) if index not in present]:
        said.append(f"layers_to_transform names {missing}, this model has layers {_span(present)}")
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in usable):
                said.append(f"{setting} {pattern!r} matches none of the adapted layers")
    return said


def _span(indices: set) -> str:
    return f"{min(indices)} to {max(indices)}" if indices else "without numbers"


def _hint(wanted: list[str] | str, modules: dict[str, nn.Module], config: PeftConfig) -> str:
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if name and adaptable(module)})
    words = [wanted] if isinstance(wanted, str) else wanted
    near = [leaf for word in words for leaf in nearest(word.rpartition(".")[2], leaves)]
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(leaves[:12])
    text = f"layers that can be adapted here: {listed or 'none'}; or target_modules='all-linear'"
    experts = _stacked(modules)
    return text + (f"; the weights of the experts are parameters: target_parameters={experts}" if experts else "")


def _stacked(modules: dict[str, nn.Module]) -> list[str]:
    """Last parts of the names of the parameters that stack the weights of several experts."""
    owners = [module for module in modules.values() if layer_class(unwrapped(module)) is None]
    return sorted({name for owner in owners for name, p in owner._parameters.items() if p is not None and p.ndim == 3})


def _warn_of_gaps(usable: list[str], modules: dict[str, nn.Module], config: PeftConfig) -> None:
    """Say when a name is adapted in some layers only, though nobody asked for that; or all-linear leaves the experts."""
    every = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    if every and not config.target_parameters and (experts := _stacked(modules)):
        warn(
            f"the weights of the experts ({', '.join(experts)}) are no linear layers, so all-linear leaves them as they "
            f"are: target_parameters={experts} adapts them"
        )
    if layer_indices(config) or not isinstance(config.target_modules, list):
        return
    present = {layer_index(name, config) for name in modules} - {None}
    for key in config.target_modules:
        found = {layer_index(name, config) for name in usable if matches(name, [key])} - {None}
        if key not in modules and found and found != present:
            warn(f"{key!r} is in {len(found)} of {len(present)} layers; the others are not adapted")


def set_trainable(model: nn.Module, config: PeftConfig, parts: Iterable[Part]) -> None:
    """Freeze everything but the biases that ``config.bias`` names; adapters switch their own parameters themselves.

    Args:
        parts: What :func:`inject` returned, for ``bias="lora_only"``.
    """
    for name, parameter in model.named_parameters():
        own = any(mark in name for mark in OWN)
        replaced = ".original_module." in name  # its copy answers in its place and would leave it without a gradient
        if not own:
            parameter.requires_grad_(config.bias == "all" and name.endswith(".bias") and not replaced)
    if config.bias == "lora_only":
        for part in parts:
            bias = getattr(part.base_layer, "bias", None) if isinstance(part, LoraLayer) else None
            if isinstance(bias, torch.Tensor):
                bias.requires_grad_(True)
