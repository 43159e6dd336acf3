"""Settings of VeRA."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from lorakeet.setting_types import Positive, Section, Seed, settings_error


class VeraConfig(Section):
    """The random matrices of VeRA (arXiv:2310.11454) that all layers share; names and defaults are PEFT's.

    Raises:
        ConfigError: A name is unknown, or a value out of range.
    """

    projection_prng_key: Seed = Field(0, description="seed of the random matrices")
    save_projection: bool = Field(
        True, description="save the random matrices with the adapter; without, the seed makes them again"
    )
    d_initial: Positive = Field(0.1, description="value at which d begins")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(error, type(self)) from None
