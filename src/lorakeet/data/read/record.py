"""One record of a source as it was found: its location, its values, and its fault if it cannot be read."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from lorakeet.errors import DataError

_SHOWN = 3  # faults of one source, and sources with faults, that an error spells out; it counts the rest

Unit = Literal["line", "row"]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record is; as text, ``quotes.jsonl:12``.

    Attributes:
        source: The file, or the data set of the hub.
        number: Line the record begins on, or row, from 1. 0: the source as a whole.
        unit: What ``number`` counts.
    """

    source: str
    number: int = 0
    unit: Unit = "line"

    def __str__(self) -> str:
        return f"{self.source}:{self.number}" if self.number else self.source

    @property
    def phrase(self) -> str:
        """The location in prose: ``quotes.jsonl, line 12``."""
        return f"{self.source}, {self.unit} {self.number}" if self.number else self.source


class Locations(Sequence[Location]):
    """Locations of many records, in 12 bytes each."""

    def __init__(self, locations: Iterable[Location] = ()) -> None:
        self._sources: dict[tuple[str, Unit], int] = {}
        self._known: list[tuple[str, Unit]] = []
        self._source_of, self._numbers = array("i"), array("q")
        for location in locations:
            self.append(location)

    def append(self, location: Location) -> None:
        """Add one location at the end."""
        key = location.source, location.unit
        at = self._sources.get(key)
        if at is None:
            at = self._sources[key] = len(self._known)
            self._known.append(key)
        self._source_of.append(at)
        self._numbers.append(location.number)

    def select(self, indices: Iterable[int]) -> Locations:
        """Return the locations at ``indices``, in that order."""
        indices = list(indices)
        chosen = Locations()
        chosen._sources, chosen._known = dict(self._sources), list(self._known)
        chosen._source_of = array("i", (self._source_of[index] for index in indices))
        chosen._numbers = array("q", (self._numbers[index] for index in indices))
        return chosen

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Location: ...
    @overload
    def __getitem__(self, index: slice) -> Locations: ...
    def __getitem__(self, index: int | slice) -> Location | Locations:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        source, unit = self._known[self._source_of[index]]
        return Location(source, self._numbers[index], unit)

    def __iter__(self) -> Iterator[Location]:
        for at, number in zip(self._source_of, self._numbers, strict=True):
            source, unit = self._known[at]
            yield Location(source, number, unit)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a record, a row or a whole source.

    Attributes:
        code: Name of the problem, one of the doctor's (:data:`lorakeet.data.doctor.issues.PROBLEMS`): ``unreadable`` (the
            source as a whole), ``broken``, ``encoding``, ``wrong_type``, ``half_character``, ``tag_count``,
            ``answer_place``.
        message: A phrase without the location.
        hint: How to correct it, if known.
    """

    code: str
    message: str
    hint: str | None = None


class FaultError(Exception):
    """Carries a fault out of a reader, where it ends the file, or out of a row's values, where it ends the row."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.fault = Fault(code, message, hint)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source.

    Attributes:
        location: Where it is.
        values: What it holds by column; None where it cannot be read.
        fault: Why it cannot be read; None where it can.
    """

    location: Location
    values: Mapping[str, Any] | None
    fault: Fault | None = None


def faults_error(faults: Iterable[tuple[Location, Fault]]) -> DataError:
    """Return one error for all ``faults``: the first few of each source are spelt out, the rest are counted."""
    by_source: dict[str, list[str]] = {}
    hint = None
    for location, fault in faults:
        place = f"{location.unit} {location.number}: " if location.number else ""
        by_source.setdefault(location.source, []).append(f"{place}{fault.message}")
        hint = hint or fault.hint
    sentences = []
    for source, phrases in by_source.items():
        more = f"; and {len(phrases) - _SHOWN:,} more" if len(phrases) > _SHOWN else ""
        sentences.append(f"{source}: {'; '.join(phrases[:_SHOWN])}{more}")
    shown = sentences[:_SHOWN] + ([f"and {len(sentences) - _SHOWN:,} more files"] if len(sentences) > _SHOWN else [])
    return DataError("; ".join(shown), hint)
