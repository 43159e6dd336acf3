"""Rows of one kind in memory, from settings: find, read, map the columns, mix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow

from lorakeet.config import DataSettings, TaskName
from lorakeet.data.read.column_types import ColumnTypes, TypeInference
from lorakeet.data.read.record import Fault, Location, Locations, Record, faults_error
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import (
    LABEL_NAMES,
    TELLING_NAMES,
    find_layout,
    merge_layouts,
    unused_columns,
    with_columns_of,
)
from lorakeet.data.rows.kinds import Layout, RowError, canonical, find_kind
from lorakeet.data.rows.mixing import draw, interleave, shares
from lorakeet.errors import DataError
from lorakeet.log import info, warn

_FIRST = 1000  # records whose types decide how a source without a schema is read first
_CHUNK = 10_000  # rows of a chunk of Arrow columns
_BATCH = 1000  # rows converted from Arrow to Python together


@dataclass(frozen=True)
class Rows:
    """Rows of one kind.

    Attributes:
        data: Canonical columns.
        locations: Of each row.
        layout: The kind, and which column of the source plays which role (of the first source, if they differ).
        description: The sources and their columns, in one phrase.
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
        return replace(self, data=select(self.data, numbers), locations=self.locations.select(numbers))


def select(data: datasets.Dataset, numbers: Sequence[int] | np.ndarray) -> datasets.Dataset:
    """Return the rows with these ``numbers``, in that order, without the pickling that ``data.select`` alone does."""
    chosen = np.asarray(numbers, dtype=np.int64)
    if len(chosen) == len(data) and np.array_equal(chosen, np.arange(len(data))):
        return data
    name = hashlib.sha256(data._fingerprint.encode() + chosen.tobytes()).hexdigest()[:32]
    return data.select(chosen, new_fingerprint=name)


def usable(data: datasets.Dataset, kind: str) -> list[int]:
    """Return the numbers of the rows that a sample can be made of."""
    is_usable = find_kind(kind).is_usable
    return [number for number, row in enumerate(iter_values(data)) if is_usable(row)]


def iter_values(data: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Yield the values of each row by column, converted from Arrow a batch at a time."""
    for batch in data.iter(_BATCH):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def read_rows(settings: DataSettings, task: TaskName = "CAUSAL_LM", *, seed: int = 0) -> Rows:
    """Read the rows of ``settings.path`` into memory, in canonical columns (:mod:`lorakeet.data.rows.kinds`).

    Several paths, and the files of a folder, follow each other. With ``data.weights`` the rows of the paths are drawn
    in these shares by ``seed``, none twice, until the first path is exhausted. A message counts the rows that are not drawn.

    Raises:
        DataError: there is no such data, or it is empty or broken (with the first locations, and the number of the rest).
            Or its columns are not what ``task`` needs, or its sources are not of one kind.
    """
    wanted = None if settings.weights is None else shares(settings)
    left = settings.limit if wanted is None else None
    parts = []
    for source in find_sources(settings):
        parts.append(_read(source, settings, task, left))
        left = left if left is None else left - len(parts[-1])
        if left == 0:
            break
    if faults := [fault for part in parts for fault in part.faults]:
        raise faults_error(faults)
    layouts = {part.source.name: part.layout for part in parts if part.layout is not None}
    layout = merge_layouts(layouts)
    for name, one in with_columns_of(layout, layouts).items():
        if one.absent:
            names = " and ".join(sorted(one.absent))
            warn(f"{name} has no column of {names}, which other sources have: none of its rows can be used")
    description = describe_sources(settings, [(part.source, part.layout) for part in parts if part.layout is not None])
    if unused := list(dict.fromkeys(label for part in parts for label in part.labels)):
        description += f"; {task} leaves {', '.join(map(repr, unused))} unused"
    locations = Locations()
    for part in parts:
        locations.extend(part.locations)
    rows = Rows(_dataset(parts, layout.features()), locations, layout, description)
    if wanted is not None:
        numbers, mixture = _mixed(parts, wanted, settings, seed)
        rows = replace(rows.select(numbers), description=f"{description}; {mixture}")
    rows.data.info.description = rows.description
    return rows


def peek(settings: DataSettings) -> Mapping[str, ColumnTypes]:
    """Return columns and their types, from the first records of the first source.

    Raises:
        DataError: there is no such data, or no record of its beginning can be read.
    """
    return find_sources(settings)[0].head_types()


def describe_sources(settings: DataSettings, found: Sequence[tuple[DataSource, Layout]]) -> str:
    """Return a phrase on the sources and their columns: ``quotes.csv (csv), text in column 'quote'``."""
    formats = " and ".join(sorted({source.format for source, _ in found}))
    files = f"{len(found)} files, {formats}" if len(found) > 1 else formats
    names = settings.path if isinstance(settings.path, list) else [settings.path or ""]
    columns: dict[str, dict[str, None]] = {}
    for _, layout in found:
        for role, column in layout.columns.items():
            columns.setdefault(role, {})[column] = None
    roles = [f"{role} in column {', '.join(map(repr, named))}" for role, named in columns.items()]
    return f"{', '.join(names)} ({files}), {', '.join(roles)}"


class _Part:
    """Rows and faults of one source; the rows become Arrow chunks while they are read, so that few are Python objects.

    Attributes:
        layout: Of the rows; None: only faults are kept.
        locations: Of the rows.
        faults: Of records without a row.
        labels: Columns of labels that the task does not use.
    """

    def __init__(self, source: DataSource, layout: Layout | None) -> None:
        self.source, self.layout = source, layout
        self.locations = Locations()
        self.faults: list[tuple[Location, Fault]] = []
        self.labels: list[str] = []
        self._schema = pyarrow.schema([]) if layout is None else layout.features().arrow_schema
        self._rows: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._chunks: list[pyarrow.RecordBatch] = []

    def __len__(self) -> int:
        return len(self.locations)

    def add(self, record: Record) -> None:
        """Take the row of a record, or its fault."""
        if record.fault is not None:
            self.faults.append((record.location, record.fault))
        elif self.layout is not None:
            try:
                row = canonical(record, self.layout)
            except RowError as error:
                self.faults.append((error.location, error.fault))
                return
            self.locations.append(record.location)
            for name, values in self._rows.items():
                values.append(row[name])
            if len(self.locations) % _CHUNK == 0:
                self._flush()

    def table(self, schema: pyarrow.Schema) -> pyarrow.Table:
        """Return the rows with the columns and types of ``schema``; null in a column that this source lacks."""
        self._flush()
        table = pyarrow.Table.from_batches(self._chunks, self._schema)
        for field in schema:
            if field.name not in table.column_names:
                table = table.append_column(field.name, pyarrow.nulls(len(table), field.type))
        return table.select(schema.names).cast(schema)

    def _flush(self) -> None:
        if any(self._rows.values()):
            self._chunks.append(pyarrow.RecordBatch.from_pydict(self._rows, self._schema))
            self._rows = {name: [] for name in self._rows}


def _dataset(parts: Sequence[_Part], features: datasets.Features) -> datasets.Dataset:
    table = pyarrow.concat_tables([part.table(features.arrow_schema) for part in parts])
    # Without a fingerprint, datasets would pickle the whole table to make one.
    return datasets.Dataset(
        datasets.table.InMemoryTable(table),
        datasets.DatasetInfo(features=features),
        fingerprint=datasets.fingerprint.generate_random_fingerprint(),
    )


def _read(source: DataSource, settings: DataSettings, task: TaskName, limit: int | None) -> _Part:
    """Read a source, whose types are those of its schema or of all of its values."""
    types: Mapping[str, ColumnTypes] | None = source.schema()
    if types is not None:
        layout = find_layout(types, settings, task, source.name)
        part = _Part(source, layout)
        for record in islice(source.rows(set(layout.columns.values())), limit):
            part.add(record)
    else:
        part, types = _read_untyped(source, settings, task, limit)
    part.faults.sort(key=lambda found: found[0].number)
    part.labels = unused_columns(types, part.layout, LABEL_NAMES)
    if telling := unused_columns(types, part.layout, TELLING_NAMES):
        warn(f"{source.name}: {task} has no use for the column {' and '.join(map(repr, telling))}, which may matter")
    return part


def _read_untyped(
    source: DataSource, settings: DataSettings, task: TaskName, limit: int | None
) -> tuple[_Part, Mapping[str, ColumnTypes]]:
    """Read a source without a schema, by the layout of its first records; again, if all records have another layout."""
    inferred = TypeInference(numbers=source.format == "csv")
    records = islice(source.rows(), limit)
    first = list(islice(records, _FIRST))
    for record in first:
        inferred.add(record.values or {})
    try:
        part = _Part(source, find_layout(inferred.types(), settings, task, source.name))
    except DataError:  # the records behind them may tell more
        part = _Part(source, None)
    is_readable = any(record.values is not None for record in first)
    for record in first:
        part.add(record)
    for record in records:
        if record.values is not None:
            inferred.add(record.values)
            is_readable = True
        part.add(record)
    if is_readable and (layout := find_layout(inferred.types(), settings, task, source.name)) != part.layout:
        part = _Part(source, layout)
        for record in islice(source.rows(), limit):
            part.add(record)
    return part, inferred.types()


def _mixed(parts: Sequence[_Part], wanted: Sequence[float], settings: DataSettings, seed: int) -> tuple[list[int], str]:
    """Draw rows in the shares ``wanted``; return their numbers, and a phrase that says how many are of each path."""
    counts = [sum(len(part) for part in parts if part.source.part == number) for number in range(len(wanted))]
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
