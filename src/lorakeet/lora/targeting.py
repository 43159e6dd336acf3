"""Targeting: the layers that the settings mean, by name alone (suffixes, regular expressions, layer numbers, patterns)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lorakeet.errors import ConfigError
from lorakeet.lora.config import PeftConfig
from lorakeet.security.patterns import SlowPatternError, fullmatch, match
from lorakeet.setting_types import NAME_ENDS_WITH, NUMBERED_LIST

#: Names of a list that a message shows.
_SHOWN = 6


@dataclass(frozen=True)
class Target:
    """A layer to adapt, or a parameter.

    Attributes:
        name: Its full name in the model.
        r: Rank.
        alpha: α.
        parameter: Whether it is a parameter.
    """

    name: str
    r: int
    alpha: float
    parameter: bool = False


def target_of(name: str, config: PeftConfig) -> Target:
    """Return the layer ``name`` with the rank and α that ``config`` gives it."""
    r = int(_pattern_value(config.rank_pattern, name, config.r))
    return Target(name, r, _pattern_value(config.alpha_pattern, name, config.lora_alpha))


def _pattern_value(patterns: dict, name: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if _matches_pattern(name, pattern)), default)


def _bounded(how: Callable[[str, str], Any], pattern: str, name: str) -> Any:
    try:
        return how(pattern, name)
    except SlowPatternError as error:
        raise ConfigError(f"the regular expression {error}", "write it without, or list the names") from None


def _matches_pattern(name: str, pattern: str) -> bool:
    return _bounded(match, NAME_ENDS_WITH.replace("{}", pattern), name) is not None


def matches(name: str, wanted: Iterable[str] | str) -> bool:
    """Whether one of the names is ``name`` or its last parts; a single string is a regular expression for all of it."""
    if isinstance(wanted, str):
        return _bounded(fullmatch, wanted, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def excluded(name: str, config: PeftConfig) -> bool:
    """Whether ``exclude_modules`` names the layer, or it is inside a module that is trained whole."""
    if config.exclude_modules and matches(name, config.exclude_modules):
        return True
    saved = config.modules_to_save or ()
    return any(f".{module}." in f".{name}." for module in saved)


# -- layer numbers ----------------------------------------------------------------------------------------------------


def layer_index(name: str, config: PeftConfig) -> int | None:
    """Return the number of the decoder (or encoder) layer that ``name`` is in: its first numbered part."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    if patterns:
        regexes = [NUMBERED_LIST.replace("{}", p) for p in patterns]
    else:
        regexes = [r"(?:.*?\.)??[^.]*[^.\d][^.]*\.(\d+)\."]  # the number of an expert in it comes later
    for regex in regexes:
        if found := _bounded(match, regex, name):
            return int(found.group(found.re.groups))  # the pattern may have groups of its own before it
    return None


def layer_wanted(name: str, config: PeftConfig) -> bool:
    """Whether ``layers_to_transform`` includes the layer."""
    indices = layer_indices(config)
    return not indices or layer_index(name, config) in indices


def layer_indices(config: PeftConfig) -> list[int]:
    """Return ``layers_to_transform`` as a list; empty if left out."""
    chosen = config.layers_to_transform
    return [chosen] if isinstance(chosen, int) else list(chosen or [])


# -- settings that match nothing --------------------------------------------------------------------------------------


def shown(wanted: list[str] | str) -> str:
    """Return ``target_modules`` as a message shows it."""
    return repr(wanted) if isinstance(wanted, str) else "[" + ", ".join(map(repr, wanted[:_SHOWN])) + "]"


def unmatched(setting: str, wanted: list[str] | str | None, names: Collection[str]) -> list[str]:
    """Return an error for each entry of a list (or for a regular expression) that matches none of the names."""
    entries = [wanted] if isinstance(wanted, str) else [[entry] for entry in wanted or ()]
    whole = "; one text is a regular expression for the whole name, names belong in a list"
    return [
        f"{setting} {shown(entry)} matches nothing in this model{whole if isinstance(entry, str) else ''}"
        for entry in entries
        if not any(name and matches(name, entry) for name in names)
    ]


def missing_layers(config: PeftConfig, names: Iterable[str]) -> list[str]:
    """Return an error if ``layers_to_transform`` has numbers that no layer has."""
    present = {layer_index(name, config) for name in names} - {None}
    missing = [index for index in layer_indices(config) if index not in present]
    if missing and not present:
        of = f" in a list named {config.layers_pattern!r}" if config.layers_pattern else ""
        return [f"layers_to_transform names {missing}, this model has no numbered layers{of}"]
    span = f"{min(present)} to {max(present)}" if present else ""  # type: ignore[type-var]
    return [f"layers_to_transform names {missing}, this model has layers {span}"] if missing else []


def unmatched_patterns(config: PeftConfig, adapted: Collection[str]) -> list[str]:
    """Return an error for each entry of ``rank_pattern`` and ``alpha_pattern`` that matches no adapted layer."""
    patterns = [(name, pattern) for name in ("rank_pattern", "alpha_pattern") for pattern in getattr(config, name)]
    return [
        f"{setting} {pattern!r} matches none of the adapted layers"
        for setting, pattern in patterns
        if not any(_matches_pattern(name, pattern) for name in adapted)
    ]


def partly_adapted(
    config: PeftConfig, adapted: Collection[str], names: Collection[str]
) -> Iterator[tuple[str, int, int]]:
    """Find entries of ``target_modules`` that exist in some layers only.

    Args:
        config: The adapter's settings.
        adapted: Names of the adapted layers.
        names: Names of all modules.

    Yields:
        The entry, the number of layers that have it, and the number of all layers. Nothing if ``layers_to_transform``
        chooses the layers.
    """
    if layer_indices(config) or not isinstance(config.target_modules, list):
        return
    present = {layer_index(name, config) for name in names} - {None}
    for key in config.target_modules:
        found = {layer_index(name, config) for name in adapted if matches(name, [key])} - {None}
        if key not in names and found and found != present:
            yield key, len(found), len(present)
