"""Configuration of the language part of a model."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """Return the configuration of a model's language part: its own, unless it reads images or sound too."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
