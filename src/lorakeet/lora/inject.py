"""Choosing layers is a plan; putting LoRA on them is an act.

:func:`plan` reads names and shapes only, so it runs on the meta device, and it raises before anything is touched.
:func:`inject` then replaces exactly what the plan names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakeet.errors import TargetError, nearest
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer import LoraLayer, Switch, layer_class
from lorakeet.lora.saved import SavedModule
from lorakeet.talk import warn

ALL_LINEAR = "all-linear"
Part = LoraLayer | SavedModule

#: Layers adapted when ``target_modules`` is left out: query and value projections, as in section 4.2 of the paper.
DEFAULT_TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(
        ["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"]
        + ["opt", "bart", "mbart", "stablelm", "gptj", "gpt_neo", "olmo", "olmo2", "granite", "cohere", "smollm3"],
        ["q_proj", "v_proj"],
    ),
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj"],
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ["c_attn"]),
    **dict.fromkeys(["bloom", "gpt_neox", "falcon"], ["query_key_value"]),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "layoutlm"], ["query", "value"]),
    "distilbert": ["q_lin", "v_lin"],
    **dict.fromkeys(["deberta-v2"], ["query_proj", "value_proj"]),
    **dict.fromkeys(["t5", "mt5"], ["q", "v"]),
    "mpt": ["Wqkv"],
}

#: Heads that a task's model makes anew, so they are trained and saved whole.
TASK_HEADS: dict[str, list[str]] = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


@dataclass(frozen=True)
class Target:
    """One layer to adapt."""

    name: str
    r: int
    alpha: float


@dataclass(frozen=True)
class Plan:
    """Which layers get a low-rank pair, and which modules are trained whole."""

    targets: tuple[Target, ...]
    saved: tuple[str, ...]

    def describe(self) -> str:
        """For example ``60 layers (30 q_proj, 30 v_proj), rank 16``."""
        counts: dict[str, int] = {}
        for target in self.targets:
            leaf = target.name.rpartition(".")[2]
            counts[leaf] = counts.get(leaf, 0) + 1
        ranks = sorted({target.r for target in self.targets})
        kinds = ", ".join(f"{count} {leaf}" for leaf, count in sorted(counts.items()))
        text = f"{len(self.targets)} layers ({kinds}), rank {', '.join(map(str, ranks))}"
        return text + (f"; trained whole: {', '.join(self.saved)}" if self.saved else "")


def plan(model: nn.Module, config: PeftConfig, *, strict: bool = True) -> Plan:
    """The layers that ``config`` means on ``model``; reads no weights and changes nothing.

    Args:
        model: Any module, on any device, meta included.
        config: ``target_modules`` must be resolved or left out (see :func:`resolve_targets`).
        strict: A name that matches nothing is an error; off when an artefact's own tensors decide.

    Raises:
        TargetError: nothing matches, a part of what was named matches nothing, or a match cannot be adapted.
    """
    modules = {name: module for name, module in model.named_modules() if not _inside_adapter(model, name)}
    wanted = resolve_targets(model, config)
    matched = [name for name in modules if name and _matches(name, wanted) and not _excluded(name, config)]
    complaints: list[str] = []
    if strict:
        complaints += _unmatched("target_modules", wanted, modules)
        complaints += _unmatched("exclude_modules", config.exclude_modules, modules)
    chosen = [name for name in matched if _layer_wanted(name, config)]
    usable = [name for name in chosen if _adaptable(modules[name])]
    complaints += [
        f"{name!r} is a {type(_unwrapped(modules[name])).__name__}, which LoRA cannot adapt (it adapts Linear, Conv1D, "
        "Embedding)"
        for name in chosen
        if name not in usable
    ][:5]
    complaints += [
        f"{name!r} belongs to nn.MultiheadAttention, which reads its weight and would pass LoRA by"
        for name in usable
        if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]
    if strict and not complaints:
        complaints += _partial(config, usable, modules)
    saved = _saved_names(config, modules, complaints if strict else [])
    if not usable and not complaints and (strict or not saved):
        complaints.append(f"target_modules={_shown(wanted)} match no layer")
    if complaints:
        raise TargetError("; ".join(complaints), _hint(wanted, modules))
    _warn_of_gaps(usable, modules, config)
    return Plan(tuple(planned(name, config) for name in usable), saved)


def resolve_targets(model: nn.Module, config: PeftConfig) -> list[str] | str:
    """``target_modules`` as names or one regular expression: ``"all-linear"`` and "left out" become lists.

    Raises:
        TargetError: left out, and no default is known for this architecture.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return _all_linear(model, config)
    if targets is not None:
        return targets
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULT_TARGETS:
        raise TargetError(
            f"no default target_modules for the architecture {kind!r}",
            "name them, for example target_modules='all-linear'",
        )
    return DEFAULT_TARGETS[kind]


def inject(model: nn.Module, what: Plan, config: PeftConfig, adapter: str, switch: Switch) -> list[Part]:
    """Put the adapter on every layer of the plan, in place; returns the layers and modules it now has a part in.

    A layer that already is a LoRA layer gets a further pair; the base layer below is the same object in all cases.
    """
    touched: list[Part] = []
    for target in what.targets:
        layer = model.get_submodule(target.name)
        if not isinstance(layer, LoraLayer):
            kind = layer_class(layer)
            assert kind is not None, f"{target.name} passed the plan"
            layer = kind(layer, switch)
            _replace(model, target.name, layer)
        layer.add_adapter(adapter, config, target.r, target.alpha)
        touched.append(layer)
    for name in what.saved:
        module = model.get_submodule(name)
        if not isinstance(module, SavedModule):
            module = SavedModule(module, switch)
            _replace(model, name, module)
        module.add_adapter(adapter)
        touched.append(module)
    return touched


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def restore(model: nn.Module) -> None:
    """Put every base layer back where it was: the inverse of all injections, whatever the adapters."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            _replace(model, name, module.base_layer)
        elif isinstance(module, SavedModule):
            _replace(model, name, module.original_module)


# -- matching -------------------------------------------------------------------------------------------------------


def _matches(name: str, wanted: Iterable[str] | str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def _excluded(name: str, config: PeftConfig) -> bool:
    if config.exclude_modules and _matches(name, config.exclude_modules):
        return True
    inside_saved = (rf"(^|.*\.){module}($|\..*)" for module in config.modules_to_save or ())
    return any(re.match(pattern, name) for pattern in inside_saved)


def _layer_index(name: str, config: PeftConfig) -> int | None:
    """The number of the decoder (or encoder) layer that ``name`` lies in: its first numbered part."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    regexes = (
        [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\.", r"[^.]*\.(\d+)\."]
    )
    for regex in regexes:
        if found := re.match(regex, name):
            return int(found.group(1))
    return None


def _layer_wanted(name: str, config: PeftConfig) -> bool:
    indices = _indices(config)
    # As in PEFT, layers_to_transform chooses among names and suffixes, not among what a regular expression matched.
    if not indices or (isinstance(config.target_modules, str) and config.target_modules.lower() != ALL_LINEAR):
        return True
    return _layer_index(name, config) in indices


def _indices(config: PeftConfig) -> list[int]:
    chosen = config.layers_to_transform
    return [chosen] if isinstance(chosen, int) else list(chosen or [])


def _pattern_value(patterns: dict, name: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def planned(name: str, config: PeftConfig) -> Target:
    """The rank and alpha that ``config`` gives the layer ``name``."""
    r = int(_pattern_value(config.rank_pattern, name, config.r))
    return Target(name, r, _pattern_value(config.alpha_pattern, name, config.lora_alpha))


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, LoraLayer) else module


def _adaptable(module: nn.Module) -> bool:
    return layer_class(_unwrapped(module)) is not None


def _inside_adapter(model: nn.Module, name: str) -> bool:
    """Whether ``name`` is a part of a LoRA layer or of a module trained whole (which are seen as one)."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))
    return any(isinstance(module, (LoraLayer, SavedModule)) for module in above)


def _all_linear(model: nn.Module, config: PeftConfig) -> list[str]:
    """Every linear layer but the head: the output embedding of a language model, the classifier of a classifier."""
    ask: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = ask()
    heads = (
        [] if head is not None else [getattr(model, key, None) for key in TASK_HEADS.get(config.task_type or "", [])]
    )
    skip = {id(module) for module in [head, *heads] if module is not None}
    return [
        name
        for name, module in model.named_modules()
        if getattr(layer_class(_unwrapped(module)), "linear", False)
        and id(module) not in skip
        and not _inside_adapter(model, name)
    ]


def _saved_names(config: PeftConfig, modules: dict[str, nn.Module], complaints: list[str]) -> tuple[str, ...]:
    names: list[str] = []
    for key in config.modules_to_save or ():
        found = [name for name in modules if name and _matches(name, [key])]
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
        if not any(name and _matches(name, entry) for name in modules)
    ]


def _partial(config: PeftConfig, usable: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """Layer numbers that do not exist and patterns that name no adapted layer."""
    said = []
    present = {_layer_index(name, config) for name in modules} - {None}
    if missing := [index for index in _indices(config) if index not in present]:
        said.append(f"layers_to_transform names {missing}, this model has layers {_span(present)}")
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in usable):
                said.append(f"{setting} {pattern!r} matches none of the adapted layers")
    return said


def _span(indices: set) -> str:
    return f"{min(indices)} to {max(indices)}" if indices else "without numbers"


def _hint(wanted: list[str] | str, modules: dict[str, nn.Module]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if name and _adaptable(module)})
    words = [wanted] if isinstance(wanted, str) else wanted
    near = [leaf for word in words for leaf in nearest(word.rpartition(".")[2], leaves)]
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(leaves[:12])
    return f"layers that can be adapted here: {listed or 'none'}; or target_modules='all-linear'"


def _warn_of_gaps(usable: list[str], modules: dict[str, nn.Module], config: PeftConfig) -> None:
    """Say when a name is adapted in some layers only, though nobody asked for that."""
    if _indices(config) or not isinstance(config.target_modules, list):
        return
    present = {_layer_index(name, config) for name in modules} - {None}
    for key in config.target_modules:
        found = {_layer_index(name, config) for name in usable if _matches(name, [key])} - {None}
        if found and found != present:
            warn(f"{key!r} is in {len(found)} of {len(present)} layers; the others are not adapted")


def set_trainable(model: nn.Module, config: PeftConfig, parts: Iterable[Part]) -> None:
    """Freeze everything but the biases that ``config.bias`` names; adapters switch their own parameters themselves.

    Args:
        parts: What :func:`inject` returned, for ``bias="lora_only"``.
    """
    for name, parameter in model.named_parameters():
        own = ".lora_" in name or ".modules_to_save." in name
        replaced = ".original_module." in name  # its copy answers in its place and would leave it without a gradient
        if not own:
            parameter.requires_grad_(config.bias == "all" and name.endswith("bias") and not replaced)
    if config.bias == "lora_only":
        for part in parts:
            bias = getattr(part.base_layer, "bias", None) if isinstance(part, LoraLayer) else None
            if isinstance(bias, torch.Tensor):
                bias.requires_grad_(True)
