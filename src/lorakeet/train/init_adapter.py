"""The adapter that a run begins with: a new one, or one to continue from, whose settings of LoRA apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.adapter.serialization import read_notes
from lorakeet.adapter.vocabulary import adapter_tokenizer, fit_to_adapters, weights_brought
from lorakeet.base.checkpoint_files import weight_reader
from lorakeet.base.load import Base, ModelInfo
from lorakeet.base.source import find_source, local_folder
from lorakeet.config import DEFAULT_MODEL, LoraSettings, RunConfig
from lorakeet.errors import ConfigError
from lorakeet.facts.limits import limits_of
from lorakeet.log import info
from lorakeet.lora.config import LoraConfig, PeftConfig
from lorakeet.lora.initialization.eva_weights import initialize_lora_eva_weights
from lorakeet.lora.initialization.loftq import start_from_loss
from lorakeet.rng import same_random_state
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


def put_adapter(config: RunConfig, base: Base, task: Task, batches: Callable[[PeftModel], list[Any]]) -> PeftModel:
    """Put the adapter of a run on its base: a new one, or the one to continue from.

    Args:
        config: Settings of the run.
        base: Its base.
        task: Its task.
        batches: Function of the model with the adapter: batches of its data, for an initialization that reads some.

    Raises:
        ConfigError: The initialization needs a quantized base, and this one is not.
    """
    if config.train.init_adapter is not None:
        return PeftModel.from_pretrained(base.model, config.train.init_adapter, is_trainable=True)
    settings = adapter_config(config, base, task)
    if settings.init_lora_weights == "loftq":
        return _with_loftq(config, base, settings)
    model = get_peft_model(base.model, settings)
    if settings.init_lora_weights == "eva":
        with same_random_state():
            # every process reads the same batches
            initialize_lora_eva_weights(model, batches(model), gather_distributed_inputs=False)
        ranks = [layer.r["default"] for layer in model.lora_layers()]
        info(
            f"EVA        {len(ranks)} layers begin with the directions of their inputs, ranks {min(ranks)} to {max(ranks)}"
        )
    return model


def _with_loftq(config: RunConfig, base: Base, settings: LoraConfig) -> PeftModel:
    """Put an adapter on a quantized base that begins with what its layers lost of their full weights."""
    begun = settings.model_copy(update={"init_lora_weights": True})
    model = get_peft_model(base.model, begun)
    folder = local_folder(find_source(config.base.model, config.base.revision))
    layers = start_from_loss(model, "default", weight_reader(folder, base.model))
    begun.init_lora_weights = "loftq"
    info(f"LoftQ      the adapter begins with what {layers} layers lost")
    return model
