"""Setup of a run's task: its type from settings, model and data, and the adapter settings that it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lorakeet.base.architectures import AUTO_CLASSES, check_task, family, fresh_modules
from lorakeet.base.device_dtype import choose_device
from lorakeet.base.load import Base, ModelInfo
from lorakeet.base.meta_device import meta_model
from lorakeet.config import QUANTIZED_FORMATS, LoraSettings, RunConfig, TaskSettings
from lorakeet.data.rows.column_mapping import choose_task
from lorakeet.data.rows.load import peek
from lorakeet.errors import ConfigError
from lorakeet.log import info, silent, warn
from lorakeet.lora.config import LoraConfig, PeftConfig
from lorakeet.lora.default_targets import resolve_config
from lorakeet.lora.inject import plan_injection
from lorakeet.lora.layer_types import adaptable
from lorakeet.lora.targeting import Target
from lorakeet.tasks.task import Task

#: Bytes of a trained parameter: its value, gradient and two moments, in fp32.
TRAINED_BYTES = 16


def task_settings(config: RunConfig, model: ModelInfo) -> TaskSettings:
    """Return the task's settings with a concrete type that model and data allow.

    Raises:
        BaseModelError: The architecture has no model for the task.
        ConfigError: The data is a stream and the number of steps is not set.
    """
    if config.data.stream and config.train.steps is None:
        raise ConfigError("the length of a stream is unknown, and train.steps is not set", "give --steps")
    name = config.task.type
    if name == "auto":
        architecture = family(model.config)
        types = peek(config.data) if architecture == "encoder" else {}  # only then do the columns decide
        name = choose_task(architecture, types, config.data.columns)
    check_task(name, model.config, model.name)
    return config.task.model_copy(update={"type": name})


def with_length(config: RunConfig, rows: int, processes: int) -> RunConfig:
    """Return the settings with the length and learning rate that they leave out, and log a length chosen for small data."""
    train = config.train.for_rows(rows, processes)
    if config.train.epochs is None and (train.epochs or 1) != 1:
        info(f"small data: {train.epochs:g} passes at {train.lr:g}; train.epochs or train.steps sets another length")
    return config.model_copy(update={"train": train})


def check_rank(
    config: RunConfig, model: ModelInfo, task: Task, free_memory: Callable[[torch.device], int | None]
) -> None:
    """Check, before any weight is read, that the settings select layers, that their ranks make sense, and that they fit.

    Args:
        config: The run's settings.
        model: The base model.
        task: The task, whose head may have any size here.
        free_memory: Function of a device that returns its free bytes; None if unknown.

    Raises:
        TargetError: The settings select no layer.
        ConfigError: What is trained does not fit into the free memory.
    """
    device = choose_device(config.base.device)
    if config.base.trust_remote_code:
        return  # its code decides which modules there are
    ghost = meta_model(model.config, auto_class=AUTO_CLASSES[task.name])
    settings: PeftConfig = LoraConfig(**lora_arguments(config.lora, config.base.bits), task_type=task.peft_type)
    with silent():  # the model itself warns once more
        targets = plan_injection(ghost, resolve_config(ghost, settings)).targets
    if not settings.variant.stores_pair:
        return  # a vector or two in each layer
    shapes = [(target.r, _matrix(ghost, target)) for target in targets]
    if shapes and all(rank > min(shape) for rank, shape in shapes):
        most = max(min(shape) for _, shape in shapes)
        warn(
            f"lora.r = {config.lora.r} is larger than every layer, whose smaller side is {most} at most: more parameters "
            "are trained than an update of full rank has"
        )
    free = free_memory(device)
    needed = sum(TRAINED_BYTES * rank * sum(shape) for rank, shape in shapes)
    if free is not None and needed > free:
        raise ConfigError(
            f"an adapter of rank {config.lora.r} takes {needed / 1e9:.1f} GB in training, {free / 1e9:.1f} GB are free",
            "give a smaller --r, or fewer target_modules",
        )


def _matrix(model: nn.Module, target: Target) -> tuple[int, int]:
    """Return the rows and columns of the weight of a layer, or of a parameter, where each expert has a matrix."""
    owner, _, name = target.name.rpartition(".") if target.parameter else (target.name, "", "weight")
    weight = model.get_submodule(owner)._parameters[name]
    assert weight is not None
    rows = weight.shape[-2] if target.parameter else weight.shape[0]
    return rows, weight.shape[-1] if target.parameter else weight.numel() // rows


def lora_arguments(lora: LoraSettings, bits: int | None) -> dict[str, Any]:
    """Return the arguments of :class:`~lorakeet.lora.config.LoraConfig`; LoftQ also needs the bits of the base.

    Raises:
        ConfigError: LoftQ, and the base is not quantized.
    """
    values = lora.model_dump()
    if lora.init_lora_weights != "loftq":
        return values
    if bits not in QUANTIZED_FORMATS:
        raise ConfigError(
            f"lora.init_lora_weights = loftq makes up for what quantization loses, and the base has {bits or 'its own'} bits",
            "--bits 8, or another initialization",
        )
    return {**values, "loftq_config": {"loftq_bits": bits}}


def adapter_config(config: RunConfig, base: Base, task: Task) -> LoraConfig:
    """Return the adapter's configuration: the run's settings, and modules with fresh random weights trained whole."""
    settings = lora_arguments(config.lora, config.base.bits)
    if task.name == "FEATURE_EXTRACTION":  # reads hidden states: no head, and nothing that only a head would read
        unread = [
            name for name, module in base.model.named_modules() if name.startswith("pooler.") and adaptable(module)
        ]
        if unread and not isinstance(settings["exclude_modules"], str):
            settings["exclude_modules"] = [*(settings["exclude_modules"] or []), *unread]
    else:
        fresh = fresh_modules(base.model, base.fresh)
        settings["modules_to_save"] = list(dict.fromkeys([*(settings["modules_to_save"] or []), *fresh])) or None
    name = {"base_model_name_or_path": base.name, "revision": config.base.revision}
    return LoraConfig(**settings, task_type=task.peft_type, **name)
