"""From settings to the rows of one kind, in memory: find, read, recognise the columns, mix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import datasets

from lorakeet.config import DataSettings, TaskName
from lorakeet.data.read.column_types import ColumnTypes
from lorakeet.data.read.record import Fault, Location, Locations, faults_error
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import find_layout, label_columns, merge_layouts
from lorakeet.data.rows.kinds import Layout, RowError, canonical
from lorakeet.data.rows.mixing import draw, interleave, shares
from lorakeet.errors import DataError
from lorakeet.log import info


@dataclass(frozen=True)
class Rows:
    """Rows of one kind.

    Attributes:
        data: Canonical columns.
        locations: Of each row.
        layout: The kind, and which column of the source plays which role (of the first source, if they differ).
        description: What was read and how it was understood, in one phrase.
    """

    data: datasets.Dataset
    locations: Locations
    layout: Layout
    description: str

    def __len__(self) -> int:
        return len(self.data)

    def select(self, numbers: Iterable[int]) -> Rows:
        """Return the rows with these ``numbers``, in that order."""
        numbers = list(numbers)
        return replace(self, data=self.data.select(numbers), locations=self.locations.select(numbers))


@dataclass
class _Part:
    """Rows and faults of one source."""

    source: DataSource
    layout: Layout | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    locations: list[Location] = field(default_factory=list)
    faults: list[tuple[Location, Fault]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # columns of labels that the task has no use for


def read_rows(settings: DataSettings, task: TaskName = "CAUSAL_LM", *, seed: int = 0) -> Rows:
    """The rows of ``settings.path``, read into memory, in canonical columns (:mod:`lorakeet.data.rows.normalize`).

    Several paths, and the files of a folder, follow each other. With ``data.weights`` the rows of the paths are drawn
    in these shares by ``seed``, none twice, until the first path is exhausted; what is left out is said.

    Raises:
        DataError: there is no such data, it is empty or broken (the first places are named, the rest are counted), its
            columns are not what ``task`` needs, or its sources are not of one kind.
    """
    wanted = shares(settings)
    left = settings.limit if wanted is None else None
    parts = []
    for source in find_sources(settings):
        parts.append(_read(source, settings, task, left))
        left = left if left is None else left - len(parts[-1].rows)
        if left == 0:
            break
    if faults := [fault for part in parts for fault in part.faults]:
        raise faults_error(faults)
    layout = merge_layouts({part.source.name: part.layout for part in parts if part.layout is not None})
    schema = layout.features()
    columns = {name: [row.get(name) for part in parts for row in part.rows] for name in schema}
    description = describe_sources(settings, [(part.source, part.layout) for part in parts if part.layout is not None])
    if unused := list(dict.fromkeys(label for part in parts for label in part.labels)):
        description += f"; {task} leaves {', '.join(map(repr, unused))} unused"
    locations = Locations(location for part in parts for location in part.locations)
    rows = Rows(datasets.Dataset.from_dict(columns, features=schema), locations, layout, description)
    if wanted is not None:
        numbers, mixture = _mixed(parts, wanted, settings, seed)
        rows = replace(rows.select(numbers), description=f"{description}; {mixture}")
    rows.data.info.description = rows.description
    return rows


def peek(settings: DataSettings) -> Mapping[str, ColumnTypes]:
    """Columns and their types, from the first records of the first source; cheap.

    Raises:
        DataError: there is no such data, or no record of its beginning can be read.
    """
    return find_sources(settings)[0].head_types()


def describe_sources(settings: DataSettings, found: Sequence[tuple[DataSource, Layout]]) -> str:
    """What was read and how it was understood, e.g. ``quotes.csv (csv), text in column 'quote'``."""
    formats = " and ".join(sorted({source.format for source, _ in found}))
    files = f"{len(found)} files, {formats}" if len(found) > 1 else formats
    names = settings.path if isinstance(settings.path, list) else [settings.path or ""]
    columns: dict[str, dict[str, None]] = {}
    for _, layout in found:
        for role, column in layout.columns.items():
            columns.setdefault(role, {})[column] = None
    roles = [f"{role} in column {', '.join(map(repr, named))}" for role, named in columns.items()]
    return f"{', '.join(names)} ({files}), {', '.join(roles)}"


def _read(source: DataSource, settings: DataSettings, task: TaskName, limit: int | None) -> _Part:
    part, needed = _Part(source), None
    types: Mapping[str, ColumnTypes] | None = source.schema()
    if types is not None:
        part.layout = find_layout(types, settings, task, source.name)
        needed = set(part.layout.columns.values())
    records = list(islice(source.rows(needed), limit))
    part.faults = [(record.location, record.fault) for record in records if record.fault is not None]
    if types is None and len(part.faults) < len(records):
        types = source.types_of(iter(records))
        part.layout = find_layout(types, settings, task, source.name)
    for record in records:
        if part.layout is not None and record.values is not None:
            try:
                part.rows.append(canonical(record, part.layout))
                part.locations.append(record.location)
            except RowError as error:
                part.faults.append((error.location, error.fault))
    part.faults.sort(key=lambda found: found[0].number)
    part.labels = label_columns(types or {}, part.layout)
    return part


def _mixed(parts: Sequence[_Part], wanted: Sequence[float], settings: DataSettings, seed: int) -> tuple[list[int], str]:
    """Draw rows in the shares ``wanted``; return their numbers, and a phrase that says how many are of each path."""
    counts = [sum(len(part.rows) for part in parts if part.source.part == number) for number in range(len(wanted))]
    drawn = draw(counts, wanted, seed, settings.limit)
    taken = [len(rows) for rows in drawn]
    names = settings.path if isinstance(settings.path, list) else [settings.path]
    phrases = (f"{take:,} of {count:,} rows of {name}" for take, count, name in zip(taken, counts, names, strict=True))
    mixture = f"mixed: {', '.join(phrases)}"
    if not sum(taken):
        raise DataError(f"nothing is left of {mixture}", "give weights that are less far apart, or more rows")
    if taken != counts:
        info(f"data: {mixture}; the rest is left out to keep the shares of data.weights")
    return interleave(drawn, counts, seed), mixture
