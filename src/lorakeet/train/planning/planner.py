"""Planner of runs by their settings alone: reads the configuration, the tokenizer and the data, and no weights."""

from __future__ import annotations

from typing import Any

import torch

from lorakeet.base.device_dtype import choose_device
from lorakeet.base.load import ModelInfo, inspect_model
from lorakeet.base.meta_device import read_config
from lorakeet.config import RunConfig
from lorakeet.data.prepare import prepare
from lorakeet.data.prepared import Prepared
from lorakeet.log import silent
from lorakeet.plan.fit import Fitted, fit
from lorakeet.plan.free_memory import free_memory
from lorakeet.plan.plan import Plan
from lorakeet.runs.process_memory import resident_bytes
from lorakeet.tasks.setup import task_settings, with_length
from lorakeet.train.init_adapter import tokenizer_and_limits, with_init_adapter
from lorakeet.train.planning.plan_run import plan_run


class Planner:
    """Plans of settings that differ in a few values; data is read once for each way of preparing it."""

    def __init__(self) -> None:
        self._data: dict[str, Prepared] = {}
        self._used: int | None = None  # before the first measurement

    def plan(self, config: RunConfig, limit: int | None = None) -> Plan:
        """Plan a run.

        Args:
            config: Its settings.
            limit: Bytes that the process may have; None: a share of what is free.

        Raises:
            BaseModelError, ConfigError, DataError, TargetError: As a run raises them before its base is loaded.
        """
        config = with_init_adapter(config)
        found = self._model(config)
        chosen = task_settings(config, found)
        data = None if config.data.path is None else self._prepared(config, chosen, found)
        rows = config.train.batch_size * config.train.grad_accum if data is None else data.report.train_samples
        with silent():
            config = with_length(config, rows, 1)
        self._used = self._used or resident_bytes()
        return plan_run(config, found, chosen, data, limit=limit, used=self._used)

    def _model(self, config: RunConfig) -> ModelInfo:
        """Return configuration and tokenizer; without data the configuration suffices."""
        if config.data.path is not None:
            return inspect_model(config.base)
        read = read_config(config.base.model)
        return ModelInfo(read._name_or_path, read, None)  # type: ignore[arg-type]

    def _prepared(self, config: RunConfig, chosen: Any, found: ModelInfo) -> Prepared:
        key = config.data.model_dump_json() + chosen.model_dump_json()
        if key not in self._data:
            tokenizer, limits = tokenizer_and_limits(config, found)
            self._data[key] = prepare(config.data, chosen, tokenizer, seed=config.train.seed, **limits)
        return self._data[key]


def fit_run(config: RunConfig, limit: int | None) -> Fitted:
    """Choose the changes that make a run fit and cost least time.

    Args:
        config: Its settings.
        limit: Bytes that the process may have; None: what it has and what is free.

    Raises:
        ConfigError: No change makes it fit.
    """
    if limit is None:
        device = choose_device(config.base.device)
        used = resident_bytes() if device.type == "cpu" else torch.cuda.memory_allocated(device)
        limit = used + (free_memory(device) or 1 << 62)
    return fit(config, Planner().plan, limit)
