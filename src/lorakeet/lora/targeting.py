"""Which names the settings mean: suffixes, regular expressions, layer numbers, ranks by pattern. Names only, no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lorakeet.lora.config import PeftConfig

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Target:
    """One layer to adapt, or one parameter."""

    name: str
    r: int
    alpha: float
    parameter: bool = False


def matches(name: str, wanted: Iterable[str] | str) -> bool:
    """Whether one of the names is ``name`` or its last parts; or the regular expression is all of it."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def excluded(name: str, config: PeftConfig) -> bool:
    """Whether ``exclude_modules`` names the layer, or it lies in a module that is trained whole."""
    if config.exclude_modules and matches(name, config.exclude_modules):
        return True
    inside_saved = (rf"(^|.*\.){module}($|\..*)" for module in config.modules_to_save or ())
    return any(re.match(pattern, name) for pattern in inside_saved)


def layer_index(name: str, config: PeftConfig) -> int | None:
    """The number of the decoder (or encoder) layer that ``name`` lies in: its first numbered part."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    regexes = (
        [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\.", r"[^.]*\.(\d+)\."]
    )
    for regex in regexes:
        if found := re.match(regex, name):
            return int(found.group(1))
    return None


def layer_wanted(name: str, config: PeftConfig) -> bool:
    """Whether ``layers_to_transform`` lets the layer pass."""
    indices = layer_indices(config)
    # As in PEFT, layers_to_transform chooses among names and suffixes, not among what a regular expression matched.
    if not indices or (isinstance(config.target_modules, str) and config.target_modules.lower() != ALL_LINEAR):
        return True
    return layer_index(name, config) in indices


def layer_indices(config: PeftConfig) -> list[int]:
    """``layers_to_transform`` as a list; empty if left out."""
    chosen = config.layers_to_transform
    return [chosen] if isinstance(chosen, int) else list(chosen or [])


def _value_of(patterns: dict, name: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def planned(name: str, config: PeftConfig) -> Target:
    """The rank and alpha that ``config`` gives the layer ``name``."""
    r = int(_value_of(config.rank_pattern, name, config.r))
    return Target(name, r, _value_of(config.alpha_pattern, name, config.lora_alpha))
