"""Limits of a base on what it reads: tokens of a text, and rows of the embedding."""

from __future__ import annotations

from typing import Any, NamedTuple

from lorakeet.facts.vocabulary import vocabulary_size
from lorakeet.facts.window import window


class Limits(NamedTuple):
    """Limits of a base; None: there is none, or it is unknown.

    Attributes:
        tokens: See :func:`lorakeet.facts.window.window`.
        rows: See :func:`lorakeet.facts.vocabulary.vocabulary_size`.
    """

    tokens: int | None = None
    rows: int | None = None


def limits_of(config: Any) -> Limits:
    """Return the limits that the configuration of a model states."""
    return Limits(window(config), vocabulary_size(config))
