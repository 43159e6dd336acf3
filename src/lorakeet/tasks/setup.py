"""Setup of a run's task: its type from settings, model and data, and the adapter settings that it needs."""

from __future__ import annotations

from lorakeet.base.architectures import check_task, family, fresh_modules
from lorakeet.base.load import Base, ModelInfo
from lorakeet.config import RunConfig, TaskSettings
from lorakeet.data.rows.column_mapping import choose_task
from lorakeet.data.rows.load import peek
from lorakeet.errors import ConfigError
from lorakeet.lora.config import LoraConfig
from lorakeet.lora.layer_types import adaptable
from lorakeet.tasks.task import Task


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


def adapter_config(config: RunConfig, base: Base, task: Task) -> LoraConfig:
    """Return the adapter's configuration: the run's settings, and modules with fresh random weights trained whole."""
    settings = config.lora.model_dump()
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
