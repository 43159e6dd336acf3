"""Changes of settings that make a training fit into memory, chosen by the time that they cost.

Checkpointed layers and smaller passes change no result but by rounding. A base in 8 or 4 bits is rounded itself. Shorter
samples lose data, so they come last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorakeet.config import QUANTIZED_FORMATS, RunConfig
from lorakeet.errors import ConfigError
from lorakeet.plan.plan import Plan
from lorakeet.plan.report import size

#: Share of the limit that the predicted peak may have: predictions err by a few per cent.
MARGIN = 0.95
#: Time, as a share of it, that one more changed setting must save.
WORTH = 0.05
#: Halvings of a pass and of the samples that are tried.
HALVINGS, SHORTENINGS = 5, 3
#: Tokens that samples are not shortened below.
SHORTEST = 64
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Changes = Mapping[str, Any]
Planner = Callable[[RunConfig, int], Plan]


@dataclass(frozen=True)
class Fitted:
    """Settings that fit.

    Attributes:
        config: All settings.
        changes: Those that are changed, by dotted name.
        plan: Their plan.
    """

    config: RunConfig
    changes: Changes
    plan: Plan


def bytes_of(text: str) -> int:
    """Return the bytes that a size such as ``2GB`` or ``1500 MiB`` means.

    Raises:
        ConfigError: It is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factor = _UNITS.get(found[2].upper()) if found else None
    if found is None or factor is None or not float(found[1]) > 0:
        raise ConfigError(f"{text!r} is no size of memory, expected a number and a unit such as 2GB", "--fit 2GB")
    return int(float(found[1]) * factor)


def fit(config: RunConfig, planner: Planner, limit: int) -> Fitted:
    """Choose the changes that make a training fit and cost least time.

    Args:
        config: Settings of the run.
        planner: Plans settings, given the bytes that the process may have.
        limit: Bytes that the process may have.

    Raises:
        ConfigError: No change makes it fit.
    """
    allowed = int(limit * MARGIN)
    least = None
    for changes_of_length in _lengths(config):
        found: list[Fitted] = []
        for changes in _combinations(config, changes_of_length):
            one = _planned(config, changes, planner, allowed)
            least = min(least or one.plan.memory.peak, one.plan.memory.peak)
            if one.plan.fits(allowed):
                if not changes and one.plan.every is None:
                    return one
                found.append(one)
        if found:
            return min(found, key=_cost)
    raise ConfigError(
        f"no settings fit into {size(limit)}: the least that was found is {size(least or 0)}, with a share of "
        f"{1 - MARGIN:.0%} left free",
        "take a smaller base, or give more memory",
    )


def _cost(one: Fitted) -> float:
    """Return the time of a token, with a price for each changed setting."""
    return one.plan.step_seconds / one.plan.step_tokens * (1 + WORTH * len(one.changes))


def _planned(config: RunConfig, changes: Changes, planner: Planner, allowed: int) -> Fitted:
    settings = with_changes(config, changes)
    plan = planner(settings, allowed)
    if settings.train.gradient_checkpointing == "auto" and plan.every is not None:
        chosen = {"train.gradient_checkpointing": True if plan.every == 1 else plan.every}
        changes = {**changes, **chosen}
        settings = with_changes(settings, chosen)
    return Fitted(settings, changes, plan)


def with_changes(config: RunConfig, changes: Changes) -> RunConfig:
    """Return settings with some of them changed, by dotted name."""
    for name, value in changes.items():
        section, _, key = name.partition(".")
        part = getattr(config, section).model_copy(update={key: value})
        config = config.model_copy(update={section: part})
    return config


def _lengths(config: RunConfig) -> Iterator[Changes]:
    """Yield no change, and then ever shorter samples."""
    yield {}
    length = config.data.max_length
    for _ in range(SHORTENINGS):
        length //= 2
        if length >= SHORTEST:
            yield {"data.max_length": length}


def _combinations(config: RunConfig, changes: Changes) -> Iterator[Changes]:
    """Yield changes of the size of a pass and of the bits of the base, the fewest first."""
    now = config.base.bits if config.base.bits in QUANTIZED_FORMATS else max(QUANTIZED_FORMATS) + 1
    coarser = [{"base.bits": bits} for bits in sorted(QUANTIZED_FORMATS, reverse=True) if bits < now]
    for bits in ({}, *coarser):
        for halvings in range(HALVINGS):
            smaller = _smaller_passes(config, changes, halvings)
            if smaller is not None:
                yield {**changes, **bits, **smaller}


def _smaller_passes(config: RunConfig, changes: Changes, halvings: int) -> Changes | None:
    """Return changes with which a pass has half as many tokens, some times over; None if a sample has no half.

    A step keeps its samples: smaller micro-batches are more of them.
    """
    if not halvings:
        return {}
    train = config.train
    part = 2**halvings
    length = changes.get("data.max_length", config.data.max_length)
    micro_batch = train.batch_size * length
    tokens = min(train.token_budget or micro_batch, micro_batch) // part
    if tokens < length // 2:
        return None
    size_of_batch = max(train.batch_size // part, 1)
    while train.batch_size % size_of_batch:
        size_of_batch -= 1
    smaller: dict[str, Any] = {"train.token_budget": tokens}
    if size_of_batch != train.batch_size:
        smaller["train.batch_size"] = size_of_batch
        smaller["train.grad_accum"] = train.grad_accum * train.batch_size // size_of_batch
    return smaller
