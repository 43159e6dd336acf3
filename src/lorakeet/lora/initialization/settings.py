"""Settings of single initializations, with the names and defaults of PEFT's classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakeet.errors import ConfigError
from lorakeet.log import warn
from lorakeet.setting_types import settings_object


@dataclass
class LoftQConfig:
    """Settings of LoftQ.

    Attributes:
        loftq_bits: Bits of the quantized base: 4 or 8.
        loftq_iter: Number of alternations between quantization and decomposition.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """Settings of EVA.

    Attributes:
        rho: Largest rank of a layer, as a multiple of r; 1: all layers keep r.
        tau: Cosine similarity of a direction in two steps from which on it has converged.
        use_label_mask: Whether tokens without a label do not count.
        label_mask_value: The label of those.
        whiten: Whether to divide each direction by the root of its singular value.
        adjust_scaling_factors: Whether α follows a changed rank, so that s stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ConfigError(f"rho = {self.rho} in eva_config, expected at least 1")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau = {self.tau} in eva_config, expected a number between 0 and 1")


#: Initialization -> the key of its settings in the adapter's file, and their class.
OWN_SETTINGS: dict[str, tuple[str, Any]] = {"loftq": ("loftq_config", LoftQConfig), "eva": ("eva_config", EvaConfig)}


def own_settings(how: bool | str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of single initializations as an adapter keeps them: LoftQ's as a dictionary, as in PEFT.

    Args:
        how: The setting ``init_lora_weights``.
        given: Keys of an adapter's file, or arguments.

    Raises:
        ConfigError: A value is unknown or out of range; or LoftQ has none.
    """
    kept: dict[str, Any] = {}
    for name, (key, kind) in OWN_SETTINGS.items():
        value = given.get(key)
        if name != how:
            if value:
                warn(f"`{key}` specified but will be ignored when `init_lora_weights` is not {name!r}: it is {how!r}")
            kept[key] = {} if name == "loftq" else None
            continue
        if name == "loftq" and not value:
            raise ConfigError(
                "`loftq_config` must be specified when `init_lora_weights` is 'loftq'", "{'loftq_bits': 8}"
            )
        made = settings_object(key, kind, value or {})
        kept[key] = dataclasses.asdict(made) if name == "loftq" else made
    return kept


def written(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in the form of JSON."""
    return {key: vars(value).copy() if dataclasses.is_dataclass(value) else value for key, value in values.items()}
