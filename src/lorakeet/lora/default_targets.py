"""Defaults where the settings leave the layers open: query and value projections, and the task's fresh head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorakeet.errors import TargetError
from lorakeet.log import warn
from lorakeet.lora.checks.direct_reads import direct_read, left_out_text
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer_types import inside_adapter, layer_class, unwrapped
from lorakeet.lora.targeting import layer_indices, layer_wanted, matches
from lorakeet.setting_types import ALL_LINEAR

#: Names of the query and value projections (section 4.2 of the paper); the first of these that a model has.
PROJECTIONS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Mixtral, Qwen, Gemma, OPT, BART, Marian, Pegasus, Whisper
    ("query", "value"),  # BERT, RoBERTa, XLM-R, ALBERT, ELECTRA
    ("query_key_value",),  # BLOOM, GPT-NeoX, Falcon
    ("query_proj", "value_proj"),  # DeBERTa v2 and v3
    ("q_lin", "v_lin"),  # DistilBERT
    ("c_attn",),  # GPT-2
    ("qkv_proj",),  # Phi-3
    ("Wqkv",),  # ModernBERT, MPT
    ("q", "v"),  # T5, mT5, MPNet
)
#: Architecture -> PEFT's default, where it is not the first known pair of projections.
OTHER_DEFAULTS: dict[str, list[str] | str] = {
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "deberta": ["in_proj"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    **dict.fromkeys(["gemma3", "gemma4"], r".*language_model\..*\.(q_proj|v_proj)"),  # not the vision tower
}

#: Task -> usual names of its fresh heads, which are not in the base's checkpoint.
TASK_HEADS: dict[str, list[str]] = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def resolve_targets(model: nn.Module, config: PeftConfig) -> list[str] | str:
    """Return ``target_modules`` as names or one regular expression: ``"all-linear"`` and "left out" become lists.

    A default that is a regular expression (Gemma's) becomes a list too where ``layers_to_transform`` chooses layers.

    Raises:
        TargetError: left out, and the model has no query and value projections of a known name.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        _warn_of_experts(model, config)
        return all_linear(model, config)
    if targets is not None:
        return targets
    found = default_targets(model)
    if found is None and config.target_parameters:
        return []
    if found is None:
        raise TargetError(
            f"no default target_modules for the architecture {_architecture(model)!r}",
            "name them, for example target_modules='all-linear'",
        )
    if isinstance(found, str) and layer_indices(config):
        return [name for name in _linear_names(model) if matches(name, found) and layer_wanted(name, config)]
    return found


def _warn_of_experts(model: nn.Module, config: PeftConfig) -> None:
    if not config.target_parameters and (experts := stacked_parameters(model.modules())):
        warn(
            f"the weights of the experts ({', '.join(experts)}) are not linear layers, so all-linear does not adapt them; "
            f"target_parameters={experts} does"
        )


def stacked_parameters(modules: Iterable[nn.Module]) -> list[str]:
    """List the last parts of the names of parameters that stack the weights of several experts."""
    owners = [module for module in modules if layer_class(unwrapped(module)) is None]
    return sorted({name for owner in owners for name, p in owner._parameters.items() if p is not None and p.ndim == 3})


def _architecture(model: nn.Module) -> str | None:
    name: str | None = getattr(getattr(model, "config", None), "model_type", None)
    return name


def default_targets(model: nn.Module) -> list[str] | str | None:
    """Return the layers to adapt by default, PEFT's choice, by the names of the model's layers; None if unknown."""
    architecture = _architecture(model)
    if architecture is None or architecture in OTHER_DEFAULTS:
        return OTHER_DEFAULTS.get(architecture or "")
    leaves = {name.rpartition(".")[2] for name in _linear_names(model)}
    return next((list(names) for names in PROJECTIONS if leaves.issuperset(names)), None)


def all_linear(model: nn.Module, config: PeftConfig) -> list[str]:
    """List all linear layers except the head: a language model's output embedding, or another task's fresh head.

    Layers whose parent reads their weight itself are left out, with a warning.
    """
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    heads = [] if head is not None else task_heads(model, config.task_type)
    modules = dict(model.named_modules())
    names = [
        name
        for name in _linear_names(model)
        if modules[name] is not head and not any(f"{name}.".startswith(f"{top}.") for top in heads)
    ]
    reasons = {name: reason for name in names if (reason := direct_read(modules, name))}
    if reasons:
        warn(f"all-linear leaves out {left_out_text(reasons, reasons)}")
    return [name for name in names if name not in reasons]


def _linear_names(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if getattr(layer_class(unwrapped(module)), "linear", False) and not inside_adapter(model, name)
    ]


def task_heads(model: nn.Module, task_type: str | None) -> list[str]:
    """List the fresh modules of a task's model, which are trained and saved whole.

    These are the usual names, whether they exist or not, as PEFT lists them. Other modules with parameters outside of the
    base model follow, like BART's classification_head.
    """
    usual = TASK_HEADS.get(task_type or "", [])
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not usual or not isinstance(base, nn.Module):
        return list(usual)
    outside = [
        name
        for name, child in model.named_children()
        if child is not base and next(child.parameters(), None) is not None
    ]
    return list(dict.fromkeys([*usual, *outside]))


def resolve_config(model: nn.Module, config: PeftConfig, fresh: bool = True) -> PeftConfig:
    """Return a copy of ``config`` as it will be saved: with the names of the targets, the fresh head and the base.

    Args:
        model: The base model.
        config: The adapter's settings.
        fresh: Whether the adapter is a new one. The file of a saved one knows its head, so only heads of usual names are
            added, as PEFT does.
    """
    targets = resolve_targets(model, config)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        targets = _shortest_names(model, list(targets))
    heads = task_heads(model, config.task_type) if fresh else TASK_HEADS.get(config.task_type or "", [])
    saved = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
    name = config.base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    copy = config.model_copy(deep=True)
    copy.target_modules, copy.modules_to_save, copy.base_model_name_or_path = targets, saved or None, name or None
    return copy


def _shortest_names(model: nn.Module, names: list[str]) -> list[str]:
    """Return the last parts of ``names`` if they mean the same layers of ``model``, else the full names."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return leaves if meant == set(names) and not any(leaf.isdigit() for leaf in leaves) else names
