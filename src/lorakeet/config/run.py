"""Settings of a complete run: read, checked, written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from lorakeet.config.adalora import SCHEDULE_HINT
from lorakeet.config.base import BaseSettings
from lorakeet.config.data import DataSettings
from lorakeet.config.lora import LoraSettings
from lorakeet.config.task import TaskSettings
from lorakeet.config.train import TrainSettings
from lorakeet.setting_types import Section, Text, contradiction, settings_error
from lorakeet.settings_file import parse_override, put, read_tree


class RunConfig(Section):
    """Settings of a run, complete; ``lorakeet train run.yaml lora.r=32`` reads, overrides and checks them."""

    base: BaseSettings = Field(default_factory=BaseSettings, description="the base model")
    lora: LoraSettings = Field(default_factory=LoraSettings, description="the method")
    data: DataSettings = Field(default_factory=DataSettings, description="the data")
    task: TaskSettings = Field(default_factory=TaskSettings, description="the task")
    train: TrainSettings = Field(default_factory=TrainSettings, description="the training")
    out: Text = Field("lorakeet-run", description="folder of the run: run.yaml, metrics.jsonl, summary.json, adapter/")

    @model_validator(mode="after")
    def _ranks_can_fall(self) -> Self:
        adalora, steps = self.lora.adalora_config, self.train.steps
        if adalora is not None and steps is not None and (error := adalora.schedule_error(steps)):
            raise contradiction(error, SCHEDULE_HINT)
        return self

    def to_yaml(self) -> str:
        """Return the complete configuration as YAML, in the order of the classes above."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def make_run(values: Mapping[str, Any]) -> RunConfig:
    """Return a checked :class:`RunConfig` from nested values.

    Raises:
        ConfigError: Settings are unknown, of the wrong type or out of range; the message lists all of them.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise settings_error(error, RunConfig) from None


def read_run(
    path: str | Path | None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a run's YAML file, then apply ``values`` and ``overrides``; later ones win.

    Args:
        path: The YAML file; None for the defaults.
        overrides: Words of the form ``section.key=value``.
        values: Dotted name -> value, as the flags of a command set them; None means not set.

    Returns:
        The checked settings.

    Raises:
        ConfigError: The file is missing or no mapping, an override is malformed, or a setting is unknown or wrong.
    """
    tree = {} if path is None else read_tree(path, list(RunConfig.model_fields))
    for name, value in (values or {}).items():
        if value is not None:
            put(tree, name, value)
    for override in overrides:
        put(tree, *parse_override(override))
    return make_run(tree)
