"""Choose the layers to adapt (a plan), then put adapters on them (an act).

:func:`plan_injection` reads names and shapes only, so it runs on the meta device, and it raises before anything is changed.
:func:`inject` then replaces exactly the layers of the plan.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from lorakeet.errors import TargetError, nearest
from lorakeet.log import warn
from lorakeet.lora.checks.direct_reads import direct_read, leave_fast_path, left_out_text, return_to_fast_path
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.default_targets import TASK_HEADS, resolve_targets, stacked_parameters
from lorakeet.lora.initialization.requirements import initialization_error
from lorakeet.lora.layer import ActiveAdapters, LoraLayer
from lorakeet.lora.layer_types import ADAPTABLE, adaptable, inside_adapter, layer_class, unwrapped
from lorakeet.lora.modules_to_save import SavedModule, chosen_modules
from lorakeet.lora.peft_names.words import NO_BIAS, NO_TARGET
from lorakeet.lora.target_parameters import LoraOutProjection, LoraParameter, attention_error, attention_targets
from lorakeet.lora.targeting import (
    Target,
    excluded,
    layer_indices,
    layer_wanted,
    matches,
    missing_layers,
    partly_adapted,
    shown,
    target_of,
    unmatched,
    unmatched_patterns,
)
from lorakeet.lora.trainable_tokens import TiedLayer, TrainableTokens
from lorakeet.lora.weight_tying import TyingPlan, plan_tying, trained_tokens

Part = LoraLayer | SavedModule
Modules = dict[str, nn.Module]
L = TypeVar("L", bound=nn.Module)
#: Parts of the names of an adapter's own parameters.
OWN = (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")
#: Errors of one sort that are listed; one wrong setting can concern every layer.
_LISTED = 5


@dataclass(frozen=True)
class InjectionPlan:
    """The layers and parameters to adapt, and what else is trained.

    Attributes:
        targets: Layers and parameters that get an A and a B.
        saved: Names of modules trained whole.
        tokens: Names of layers, and the rows trained there.
        tied: Pairs (follower, embedding) of layers that share a weight and so follow the embedding.
    """

    targets: tuple[Target, ...]
    saved: tuple[str, ...]
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """Return one line, for example ``60 layers (30 q_proj, 30 v_proj), rank 16``."""
        parts = []
        for word in ("layers", "parameters"):
            leaves = [t.name.rpartition(".")[2] for t in self.targets if t.parameter == (word == "parameters")]
            counts = ", ".join(f"{leaves.count(leaf)} {leaf}" for leaf in sorted(set(leaves)))
            parts += [f"{len(leaves)} {word} ({counts})"] if leaves else []
        ranks = sorted({target.r for target in self.targets})
        text = f"{' and '.join(parts) or '0 layers'}, rank {', '.join(map(str, ranks))}"
        text += f"; trained whole: {', '.join(self.saved)}" if self.saved else ""
        text += "".join(f"; {len(tokens)} tokens of {name}" for name, tokens in self.tokens)
        return text + (f"; tied: {', '.join(name for name, _ in self.tied)}" if self.tied else "")


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan_injection(model: nn.Module, config: PeftConfig, *, strict: bool = True) -> InjectionPlan:
    """Find the layers that ``config`` means on ``model``; reads no weights and changes nothing.

    Args:
        model: Any module, on any device, meta included.
        config: ``target_modules`` must be resolved or left out (see :func:`resolve_targets`).
        strict: A name that matches nothing is an error; off when a saved adapter's own tensors decide.

    Raises:
        TargetError: nothing matches, some of the names match nothing, or a match cannot be adapted.
    """
    modules = {name: module for name, module in model.named_modules() if not inside_adapter(model, name)}
    wanted = resolve_targets(model, config)
    errors = unmatched("target_modules", wanted, modules) if strict else []
    errors += unmatched("exclude_modules", config.exclude_modules, modules) if strict else []
    layers, layer_errors = _chosen_layers(config, wanted, modules)
    parameters, parameter_errors = _chosen_parameters(config, modules, layers, strict)
    errors += layer_errors + parameter_errors
    if strict and not errors:
        errors += missing_layers(config, modules) + unmatched_patterns(config, [*layers, *parameters])
    saved, saved_errors = chosen_modules(
        modules, config.modules_to_save or (), [*layers, *parameters], TASK_HEADS.get(config.task_type or "", [])
    )
    errors += [error for error, missing in saved_errors if strict or not missing]
    tokens, token_errors = trained_tokens(model, config, modules, [*layers, *saved])
    tying = plan_tying(model, config, modules, TyingPlan(tuple(layers), saved, tokens))
    errors += [*token_errors, *tying.errors]
    for warning in tying.warnings:
        warn(warning)
    if not tying.layers and not parameters and not tying.tokens and not errors and (strict or not tying.saved):
        errors.append(f"target_modules={shown(wanted)} match no layer")
    if errors:
        raise TargetError("; ".join(errors), _hint(wanted, modules))
    _warn_of_gaps(tying.layers, modules, config)
    targets = []
    for name in tying.layers:
        is_attention = isinstance(modules[name], nn.MultiheadAttention)
        targets += attention_targets(target_of(name, config)) if is_attention else [target_of(name, config)]
    targets += [replace(target_of(name, config), parameter=True) for name in parameters]
    rows = tuple((name, tuple(numbers)) for name, numbers in tying.tokens.items())
    return InjectionPlan(tuple(targets), tying.saved, rows, tying.tied)


def _chosen_layers(config: PeftConfig, wanted: list[str] | str, modules: Modules) -> tuple[list[str], list[str]]:
    """Return the names of the layers to adapt, and errors."""
    matched = [name for name in modules if name and matches(name, wanted) and not excluded(name, config)]
    chosen = [name for name in matched if layer_wanted(name, config)]
    layers, passed_by = _called_layers([name for name in chosen if adaptable(modules[name])], wanted, modules)
    unknown = [
        f"{name!r} is a {type(unwrapped(modules[name])).__name__}, which LoRA cannot adapt (it adapts {ADAPTABLE})"
        for name in chosen
        if not adaptable(modules[name])
    ]
    unfit = [f"{name!r} {error}" for name in layers if (error := _layer_error(name, modules, config))]
    return layers, unknown[:_LISTED] + passed_by[:_LISTED] + unfit[:_LISTED]


def _called_layers(names: list[str], wanted: list[str] | str, modules: Modules) -> tuple[list[str], list[str]]:
    """Leave out layers whose parent reads their weight itself, with a warning; an error where ``wanted`` names no other."""
    reasons = {name: reason for name in names if (reason := direct_read(modules, name))}
    entries = [wanted] if isinstance(wanted, str) else [[entry] for entry in wanted]
    matched = [[name for name in names if matches(name, entry)] for entry in entries] if reasons else []
    refused = [name for found in matched if reasons.keys() >= set(found) for name in found]
    if left_out := [name for name in reasons if name not in refused]:
        warn(f"not adapted: {left_out_text(left_out, reasons)}")
    return [name for name in names if name not in reasons], [f"{name!r} {reasons[name]}" for name in refused]


def _layer_error(name: str, modules: Modules, config: PeftConfig) -> str | None:
    """Return why a layer of an adaptable type cannot be adapted with these settings; None if it can."""
    base = unwrapped(modules[name])
    if isinstance(base, nn.MultiheadAttention):
        return (
            attention_error(base, config)
            or config.variant.unsupported(base)
            or initialization_error(base, config, target_of(name, config).r)
        )
    if "lora_parameters" in base._modules:
        return "has a parameter that another adapter's target_parameters adapt"
    if config.lora_bias and isinstance(base, nn.Embedding):
        return "has no bias to train: lora_bias=True is not supported for Embedding"
    layer_type = layer_class(base)
    assert layer_type is not None
    if isinstance(modules[name], LoraLayer) and type(modules[name]) is not layer_type:
        return "is adapted by another adapter in another way (tied, or single tokens)"
    r = target_of(name, config).r
    return layer_type.rank_error(base, r) or config.variant.unsupported(base) or initialization_error(base, config, r)


def _chosen_parameters(
    config: PeftConfig, modules: Modules, layers: list[str], strict: bool
) -> tuple[list[str], list[str]]:
    """Return the full names of the parameters that ``target_parameters`` means, and errors.

    As in PEFT, the settings that choose among layers do not apply.
    """
    wanted = config.target_parameters or []
    all_parameters = {
        f"{path}.{name}": parameter
        for path, module in modules.items()
        for name, parameter in unwrapped(module)._parameters.items()
        if parameter is not None
    }
    found = {name: parameter for name, parameter in all_parameters.items() if matches(name, wanted)}
    missing = [key for key in wanted if not any(matches(name, [key]) for name in found)] if strict else []
    errors = [f"target_parameters {key!r} matches no parameter of this model" for key in missing]
    errors += [NO_TARGET] if missing and not found and not config.target_modules else []
    for name, parameter in found.items():
        owner = name.rpartition(".")[0]
        if owner in layers or isinstance(modules[owner], LoraLayer):
            errors.append(f"{name!r} belongs to a layer that target_modules adapts already")
        elif not owner:
            errors.append(f"{name!r} is a parameter of the model itself, for which the file format has no name")
        elif parameter.ndim not in (2, 3) or not parameter.is_floating_point():
            shape = f"{parameter.dtype} {list(parameter.shape)}"
            errors.append(f"{name!r} is {shape}, expected a floating [out, in] or [experts, out, in]")
        elif error := config.variant.unsupported(parameter) or initialization_error(parameter, config, config.r):
            errors.append(f"{name!r} {error}")
    if found and layer_indices(config):
        warn("layers_to_transform applies to target_modules only; to choose among parameters, write their full names")
    return list(found), errors


def _hint(wanted: list[str] | str, modules: Modules) -> str:
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if name and adaptable(module)})
    words = [wanted] if isinstance(wanted, str) else wanted
    near = [leaf for word in words for leaf in nearest(word.rpartition(".")[2], leaves)]
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(leaves[:12])
    text = f"layers that can be adapted here: {listed or 'none'}; or target_modules='all-linear'"
    experts = stacked_parameters(modules.values())
    return text + (f"; the weights of the experts are parameters: target_parameters={experts}" if experts else "")


def _warn_of_gaps(layers: Collection[str], modules: Modules, config: PeftConfig) -> None:
    """Warn if a name is in some layers only and the settings do not choose them, or if a bias cannot be merged."""
    for key, present, total in partly_adapted(config, layers, modules):
        warn(f"{key!r} is in {present} of {total} layers; the others are not adapted")
    bases = [unwrapped(modules[name]) for name in layers if config.lora_bias]
    for kind in sorted({type(base).__name__ for base in bases if getattr(base, "bias", None) is None}):
        warn(f"{NO_BIAS.format(kind=kind)}: such an adapter cannot be merged")


# -- the act ----------------------------------------------------------------------------------------------------------


def inject(
    model: nn.Module, plan: InjectionPlan, config: PeftConfig, adapter: str, switch: ActiveAdapters
) -> list[Part]:
    """Put the adapter on every layer of the plan, in place.

    A layer that is a LoRA layer already gets a further adapter; its base layer stays the same object in all cases.

    Args:
        model: The base model, with or without other adapters.
        plan: The layers.
        config: The adapter's settings.
        adapter: The adapter's name.
        switch: The active adapters of the model.

    Returns:
        The layers and modules that now have a part of the adapter.
    """
    touched: list[Part] = []
    shared = config.variant.shared(config, (unwrapped(model.get_submodule(target.name)) for target in plan.targets))
    for target in plan.targets:
        layer = _adapted(model, target, switch)
        layer.notes |= {} if shared is None else {adapter: shared}
        layer.leaf = target.name.rpartition(".")[2]
        layer.add_adapter(adapter, config, target.r, target.alpha)
        touched.append(layer)
    for name in plan.saved:
        module = _wrapped(model, name, SavedModule, switch)
        module.add_adapter(adapter)
        touched.append(module)
    for name, tokens in plan.tokens:
        rows = _wrapped(model, name, TrainableTokens, switch)
        rows.add_tokens(adapter, tokens)
        touched.append(rows)
    for name, embedding in plan.tied:
        source = model.get_submodule(embedding)
        if isinstance(source, SavedModule):
            follower = model.get_submodule(name)
            assert isinstance(follower, SavedModule)
            follower.share_weight(source, adapter)
            continue
        tied = _wrapped(model, name, TiedLayer, switch, source)
        tied.follow(adapter)
        touched.append(tied)
    return touched


def _wrapped(model: nn.Module, name: str, layer_type: type[L], *args: Any) -> L:
    """Return the layer of this type at ``name``; it is made and put there if there is none yet."""
    layer = model.get_submodule(name)
    if not isinstance(layer, layer_type):
        layer = layer_type(layer, *args)
        replace_module(model, name, layer)
    return layer


def _adapted(model: nn.Module, target: Target, switch: ActiveAdapters) -> LoraLayer:
    """Return the LoRA layer of the target; it is made and put there if there is none yet."""
    if target.parameter:
        owner, _, name = target.name.rpartition(".")
        leave_fast_path(model, owner)  # its hooks make the parent call it
        return LoraParameter.on(model.get_submodule(owner), name, switch)
    layer = model.get_submodule(target.name)
    if isinstance(layer, LoraLayer):
        return layer
    parent = model.get_submodule(target.name.rpartition(".")[0])
    layer_type = LoraOutProjection if isinstance(parent, nn.MultiheadAttention) else layer_class(layer)
    assert layer_type is not None, f"{target.name} passed the plan"
    made = layer_type(layer, switch)
    replace_module(model, target.name, made)
    return made


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at the place of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    if isinstance(module, (LoraLayer, SavedModule)):
        leave_fast_path(model, name, module)


def restore(model: nn.Module) -> None:
    """Put every base layer back where it was: the inverse of all injections, whatever the adapters."""
    for name, module in list(model.named_modules()):
        _release(model, name, module)
    return_to_fast_path(model)


def release_unused(model: nn.Module) -> None:
    """Put those base layers back whose adapters are all deleted, so that the next one may adapt them in another way."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (LoraLayer, SavedModule)) and not module.adapters:
            _release(model, name, module)


def _release(model: nn.Module, name: str, module: nn.Module) -> None:
    if isinstance(module, LoraParameter):
        module.release()
    elif isinstance(module, LoraLayer):
        replace_module(model, name, module.base_layer)
    elif isinstance(module, SavedModule):
        replace_module(model, name, module.original_module)


def freeze_base(model: nn.Module) -> None:
    """Freeze everything except the adapters' own parameters; each adapter makes its own trainable itself."""
    for name, parameter in model.named_parameters():
        if not any(mark in name for mark in OWN):
            parameter.requires_grad_(False)


def trained_biases(model: nn.Module, config: PeftConfig, adapter: str) -> list[nn.Parameter]:
    """Return the biases of the base that the setting ``bias`` trains with the adapter."""
    if config.bias == "lora_only":
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and adapter in layer.adapters]
        biases = [getattr(layer.base_layer, "bias", None) for layer in layers]
        return [bias for bias in biases if isinstance(bias, nn.Parameter)]
    if config.bias == "none":
        return []
    # the trained copy of a module runs in its place, so the original would get no gradient
    other = (*OWN, ".original_module.")
    named = model.named_parameters()
    return [bias for name, bias in named if name.endswith(".bias") and not any(mark in name for mark in other)]
