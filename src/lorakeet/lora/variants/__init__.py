"""The variants of LoRA: plain LoRA, and those that :func:`register` adds; each is a :class:`Variant`, chosen by its settings.

A variant is one file and one call of :func:`register`. The settings, the layers, the file format, ``lorakeet inspect`` and
the table of compatible tools ask the variant; none of them knows its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakeet.errors import ConfigError
from lorakeet.lora.variants.adalora import AdaLora
from lorakeet.lora.variants.bdlora import BdLora
from lorakeet.lora.variants.dora import Dora
from lorakeet.lora.variants.kasa import Kasa
from lorakeet.lora.variants.lora import Lora
from lorakeet.lora.variants.variant import AdaptedLayer, Variant
from lorakeet.lora.variants.velora import Velora
from lorakeet.lora.variants.vera import Vera
from lorakeet.setting_types import settings_object

__all__ = ["AdaptedLayer", "Variant", "chosen_variant", "register", "setting_value", "unregister", "variant_settings"]

#: Plain LoRA: the variant of an adapter whose settings choose no other.
_DEFAULT = Lora()
_registered: dict[str, Variant] = {}


def register(variant: Variant) -> None:
    """Make a variant known under its name.

    Raises:
        ValueError: the name is taken, no setting chooses the variant, or a parameter's name does not begin with ``lora_``.
    """
    if variant.name in (_DEFAULT.name, *_registered):
        raise ValueError(f"a variant {variant.name!r} is registered already")
    if not variant.settings:
        raise ValueError(f"variant {variant.name!r} has no settings, so no adapter could choose it")
    # this prefix is how freezing, fingerprints and optimizers recognize an adapter's parameters
    if wrong := [name for name in variant.parameters if not name.startswith("lora_")]:
        raise ValueError(f"variant {variant.name!r} has parameters {wrong}, expected names that begin with 'lora_'")
    _registered[variant.name] = variant


def unregister(name: str) -> None:
    """Remove a registered variant."""
    del _registered[name]


def variant_settings() -> dict[str, Any]:
    """Return the settings of all registered variants with the values that mean "not used"."""
    return {key: neutral for variant in _registered.values() for key, neutral in variant.settings.items()}


def setting_value(key: str, value: Any) -> Any:
    """Return the value of a setting as an object of its class, where a variant gives it one.

    Raises:
        ConfigError: Its fields are unknown, or have wrong values.
    """
    made = next((variant.types[key] for variant in _registered.values() if key in variant.types), None)
    if made is None or value is None:
        return value
    return None if value is False else settings_object(key, made, value)


def chosen_variant(settings: Mapping[str, Any]) -> Variant:
    """Return the variant that all settings of an adapter choose; plain LoRA, if they choose no other.

    Raises:
        ConfigError: they choose several variants, or the variant refuses their values.
    """
    chosen = [variant for variant in _registered.values() if variant.is_chosen(settings)]
    if len(chosen) > 1:
        raise ConfigError(f"the settings choose {' and '.join(v.name for v in chosen)}, expected one variant of LoRA")
    variant = chosen[0] if chosen else _DEFAULT
    if error := variant.settings_error(settings):
        raise ConfigError(error)
    return variant


for _variant in (Dora(), BdLora(), Velora(), Kasa(), AdaLora(), Vera()):
    register(_variant)
