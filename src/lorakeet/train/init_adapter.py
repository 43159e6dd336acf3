"""A run that continues from an adapter: the adapter's weights are the start, and its settings of LoRA apply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.adapter.serialization import read_notes
from lorakeet.adapter.vocabulary import adapter_tokenizer, fit_to_adapters, weights_brought
from lorakeet.base.load import Base, ModelInfo
from lorakeet.config import DEFAULT_MODEL, LoraSettings, RunConfig
from lorakeet.errors import ConfigError
from lorakeet.facts.limits import limits_of
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.lifecycle.frozen_a import freeze_lora_a
from lorakeet.tasks.setup import adapter_config
from lorakeet.tasks.task import Task

#: Settings of LoRA that may differ from those of the adapter: they do not change what its weights mean.
FREE_SETTINGS = ("lora_dropout", "init_lora_weights")


def with_init_adapter(config: RunConfig) -> RunConfig:
    """Return the settings with those of the adapter to continue from: LoRA, and base, task and labels if left open.

    Raises:
        AdapterError: There is no such adapter.
        ConfigError: A setting of LoRA is set to another value than the adapter has.
    """
    name = config.train.init_adapter
    if name is None:
        return config
    adapter, notes = PeftConfig.from_pretrained(name), read_notes(name)
    own = {key: getattr(adapter, key) for key in LoraSettings.model_fields}
    free = {key: getattr(config.lora, key) for key in FREE_SETTINGS}
    for key in sorted(config.lora.model_fields_set - set(FREE_SETTINGS)):
        if getattr(config.lora, key) != own[key]:
            raise ConfigError(
                f"lora.{key} = {getattr(config.lora, key)!r}: expected {own[key]!r} as in the adapter {name}",
                "leave it out: the settings of the adapter apply",
            )
    update: dict[str, Any] = {"lora": config.lora.model_copy(update={**own, **free})}
    if config.base.model == DEFAULT_MODEL and (named := adapter.named_base(name)):
        update["base"] = config.base.model_copy(update={"model": named})
    task = Task.from_notes(notes["task"]) if notes.get("task") else None
    if task is not None and task.labels and config.task.labels is None:
        update["task"] = config.task.model_copy(update={"type": task.name, "labels": list(task.labels)})
    elif task is not None and config.task.type == "auto":
        update["task"] = config.task.model_copy(update={"type": task.name})
    return config.model_copy(update=update)


def loading_options(config: RunConfig, task: Task) -> dict[str, Any]:
    """Return the arguments of :func:`lorakeet.base.load.load_base` for the base of a run."""
    brought = weights_brought(config.train.init_adapter) if config.train.init_adapter else frozenset()
    return {"model_options": task.model_options(), "seed": config.train.seed, "brought": brought}


def tokenizer_and_limits(config: RunConfig, found: ModelInfo) -> tuple[Any, dict[str, int | None]]:
    """Return the tokenizer of a run, and the limits of its model on samples.

    The tokenizer of the adapter to continue from may have more tokens: the embedding is resized to it later.
    """
    tokens, rows = limits_of(found.config)
    own = None if config.train.init_adapter is None else adapter_tokenizer(config.train.init_adapter)
    return own or found.tokenizer, {"max_positions": tokens, "vocabulary": rows if own is None else None}


def fit_base(config: RunConfig, base: Base) -> Base:
    """Return the base with the tokenizer and the vocabulary of the adapter to continue from, if there is one."""
    if config.train.init_adapter is None:
        return base
    adapters = [config.train.init_adapter]
    return replace(base, tokenizer=fit_to_adapters(base.model, base.tokenizer, adapters, seed=config.train.seed))


def put_adapter(config: RunConfig, base: Base, task: Task) -> PeftModel:
    """Put the adapter of a run on its base: a new one, or the one to continue from."""
    if config.train.init_adapter is None:
        model = get_peft_model(base.model, adapter_config(config, base, task))
    else:
        model = PeftModel.from_pretrained(base.model, config.train.init_adapter, is_trainable=True)
    if config.train.lorafa:
        freeze_lora_a(model)
    return model
