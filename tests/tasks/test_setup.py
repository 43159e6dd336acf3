"""What a run is refused for before any weight is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lorakeet.base.load import inspect_model
from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, TargetError
from lorakeet.tasks.setup import check_rank
from lorakeet.tasks.task import Task


def check(config: RunConfig, free: int | None = None) -> None:
    check_rank(config, inspect_model(config.base), Task(), lambda device: free)


def test_a_rank_larger_than_every_layer_is_taken_with_a_warning(
    settings: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    check(settings(lora__r=32))  # the query has 32 dimensions, the value 16
    assert "larger" not in caplog.text
    check(settings(lora__r=64))
    assert "lora.r = 64 is larger than every layer, whose smaller side is 32" in caplog.text


def test_an_adapter_that_does_not_fit_into_memory_is_refused(settings: Callable[..., RunConfig]) -> None:
    needed = 16 * 4 * 2 * (32 + 32 + 32 + 16)  # bytes, rank, layers, sides of a query and a value
    check(settings(), needed)
    with pytest.raises(ConfigError, match="GB in training"):
        check(settings(), needed - 1)


def test_layers_that_are_not_there_are_named_before_any_weight_is_read(settings: Callable[..., RunConfig]) -> None:
    with pytest.raises(TargetError, match="q_prj"):
        check(settings(lora__target_modules=["q_prj"]))
