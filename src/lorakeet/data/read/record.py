"""One record of a source as it was found, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakeet.errors import DataError

_SHOWN = 3  # faults of one source, and sources with faults, that are written out; the rest are counted


@dataclass(frozen=True)
class Row:
    """One record of ``source``, which stands at ``place``, counted in ``unit`` from 1 (0: the source as a whole).

    Attributes:
        source: the file, or the data set of the hub.
        place: the line it begins on, or its number.
        unit: ``line`` or ``row``.
        values: what it holds by column; None where it cannot be read.
        fault: why it cannot be read, as a phrase.
        hint: what to do about the fault, if we know.
    """

    source: str
    place: int
    unit: str
    values: Mapping[str, Any] | None
    fault: str | None = None
    hint: str | None = None

    @property
    def where(self) -> str:
        """Source and place in one word, e.g. ``quotes.jsonl:12``."""
        return f"{self.source}:{self.place}" if self.place else self.source


class Fault(Exception):  # noqa: N818 (most are handed on as values, few are raised)
    """What is wrong with a record, or, raised, with a file as a whole; ``hint``: what to do about it."""

    def __init__(self, phrase: str, hint: str | None = None) -> None:
        super().__init__(phrase)
        self.phrase, self.hint = phrase, hint


def complaint(faults: Sequence[Row]) -> DataError:
    """All the ``faults`` in one error: of each source the first few are written out, the rest counted."""
    by_source: dict[str, list[str]] = {}
    for row in faults:
        place = f"{row.unit} {row.place}: " if row.place else ""
        by_source.setdefault(row.source, []).append(f"{place}{row.fault}")
    sentences = []
    for source, phrases in by_source.items():
        more = f"; and {len(phrases) - _SHOWN:,} more" if len(phrases) > _SHOWN else ""
        sentences.append(f"{source}: {'; '.join(phrases[:_SHOWN])}{more}")
    shown = sentences[:_SHOWN] + ([f"and {len(sentences) - _SHOWN:,} more files"] if len(sentences) > _SHOWN else [])
    return DataError("; ".join(shown), next((row.hint for row in faults if row.hint), None))
