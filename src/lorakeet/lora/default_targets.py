"""What is adapted and trained where the settings leave it open: query and value projections, and the task's fresh head."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakeet.errors import TargetError
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer_types import inside_adapter, layer_class, unwrapped
from lorakeet.lora.targeting import ALL_LINEAR

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
#: Architectures for which PEFT's default is another.
OTHER_DEFAULTS: dict[str, list[str] | str] = {
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "deberta": ["in_proj"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    **dict.fromkeys(["gemma3", "gemma4"], r".*language_model\..*\.(q_proj|v_proj)"),  # not the part that sees
}

#: Usual names of the heads that a task's model makes anew.
TASK_HEADS: dict[str, list[str]] = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def resolve_targets(model: nn.Module, config: PeftConfig) -> list[str] | str:
    """``target_modules`` as names or one regular expression: ``"all-linear"`` and "left out" become lists.

    Raises:
        TargetError: left out, and the model has no query and value projections of a known name.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return all_linear(model, config)
    if targets is not None:
        return targets
    found = default_targets(model)
    if found is None and config.target_parameters:
        return []
    if found is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        raise TargetError(
            f"no default target_modules for the architecture {kind!r}",
            "name them, for example target_modules='all-linear'",
        )
    return found


def default_targets(model: nn.Module) -> list[str] | str | None:
    """The layers to adapt when nobody says which: PEFT's choice, by the names that the model's layers have."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None or kind in OTHER_DEFAULTS:
        return OTHER_DEFAULTS.get(kind or "")
    leaves = {name.rpartition(".")[2] for name in _linear_names(model)}
    return next((list(names) for names in PROJECTIONS if leaves.issuperset(names)), None)


def all_linear(model: nn.Module, config: PeftConfig) -> list[str]:
    """Every linear layer but the head: the output embedding of a language model, the fresh head of another task."""
    ask: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = ask()
    heads = [] if head is not None else task_heads(model, config.task_type)
    return [
        name
        for name in _linear_names(model)
        if model.get_submodule(name) is not head and not any(f"{name}.".startswith(f"{top}.") for top in heads)
    ]


def _linear_names(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if getattr(layer_class(unwrapped(module)), "linear", False) and not inside_adapter(model, name)
    ]


def task_heads(model: nn.Module, task_type: str | None) -> list[str]:
    """Modules that a task's model has made anew, to be trained and saved whole: the usual names (whether they are there
    or not, as PEFT lists them), and everything with parameters beside the base model, like BART's classification_head.
    """
    usual = TASK_HEADS.get(task_type or "", [])
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not usual or not isinstance(base, nn.Module):
        return list(usual)
    beside = [
        name
        for name, child in model.named_children()
        if child is not base and next(child.parameters(), None) is not None
    ]
    return list(dict.fromkeys([*usual, *beside]))
