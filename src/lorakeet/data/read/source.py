"""Sources of records: the files and hub data sets that ``data.path`` names, read one record at a time.

Read it after :mod:`~lorakeet.data.read.locate` and :mod:`~lorakeet.data.read.formats`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lorakeet.config import DataSettings
from lorakeet.data.read.column_types import (
    ColumnType,
    ColumnTypes,
    TypeInference,
    class_names,
    outer_columns,
    records,
    schema_types,
    unify,
)
from lorakeet.data.read.formats import read_file, recognize
from lorakeet.data.read.hub import hub_table
from lorakeet.data.read.locate import data_files, locate
from lorakeet.data.read.record import FaultError, Location, Record, faults_error
from lorakeet.data.read.table_formats import TABLE_READERS, table_schema
from lorakeet.errors import DataError
from lorakeet.security.paths import is_dir
from lorakeet.text_files import NotTextError

_FIRST = 1000  # records whose values decide the types of a file without a schema, where it is not read whole
_SHARE = 0.2  # of the values of a column that must be of a type for it to be one that the column holds


@dataclass(frozen=True)
class DataSource:
    """A file, or a data set of the hub.

    Attributes:
        name: the file's path, or the name on the hub.
        format: as in :mod:`lorakeet.data.read.formats`, or ``hub``.
        part: number of the path in ``data.path`` that it belongs to, from 0.
        split: which split of a hub data set, or which list of a JSON file.
        subset: which configuration of a hub data set.
    """

    name: str
    format: str
    part: int = 0
    split: str = "train"
    subset: str | None = None

    def rows(self, columns: Collection[str] | None = None) -> Iterator[Record]:
        """Yield the records; of a table, only the ``columns``, if given.

        Raises:
            DataError: the hub data set cannot be read. A file that cannot be read is a row with a fault.
        """
        if self.format != "hub":
            return read_file(Path(self.name), self.format, self.split, columns)
        return self._hub_rows(columns)

    def _hub_rows(self, columns: Collection[str] | None) -> Iterator[Record]:
        table = hub_table(self.name, self.subset, self.split)
        table = table.select_columns(outer_columns(columns, table.column_names))
        named = class_names(table.features.arrow_schema)
        batches = (batch for chunk in table.with_format("arrow").iter(1024) for batch in chunk.to_batches())
        values = (record for batch in batches for record in records(batch, named))
        for number, record in enumerate(values, start=1):
            yield Record(Location(self.name, number, "row"), record)

    def schema(self) -> dict[str, ColumnTypes] | None:
        """Return columns and their types by the schema, if the source has one; a fault shows when it is read."""
        try:
            if self.format == "hub":
                features = hub_table(self.name, self.subset, self.split).features
                return schema_types(features.arrow_schema)
            if self.format in TABLE_READERS:
                return schema_types(table_schema(Path(self.name), self.format))
        except FaultError:
            pass
        return None

    def head_types(self, count: int = _FIRST) -> Mapping[str, ColumnTypes]:
        """Return columns and their types: by the schema, else by the first ``count`` records.

        Raises:
            DataError: none of these records can be read.
        """
        known = self.schema()
        types = self.types_of(islice(self.rows(), count)) if known is None else known
        if not types and (faults := [(row.location, row.fault) for row in islice(self.rows(), count) if row.fault]):
            raise faults_error(faults)
        return types

    def usual_types(self, first_rows: Sequence[Record]) -> dict[str, ColumnTypes]:
        """Return columns and their types, by the schema or by ``first_rows``; a type of few values does not count."""
        known = self.schema()
        if known is not None:
            return known
        numbers = self.format == "csv"
        counts: dict[str, Counter[ColumnType]] = {}
        for record in first_rows:
            one = TypeInference(numbers)
            one.add(record.values or {})
            for name, types in one.types().items():
                counts.setdefault(name, Counter()).update(types)
        return {name: _usual(found, numbers) for name, found in counts.items()}

    def types_of(self, rows: Iterator[Record]) -> Mapping[str, ColumnTypes]:
        """Infer columns and their types from the values of ``rows``, of which nothing is kept."""
        types = TypeInference(numbers=self.format == "csv")
        for record in rows:
            if record.values is not None:
                types.add(record.values)
        return types.types()


def _usual(counts: Mapping[ColumnType, int], numbers: bool) -> ColumnTypes:
    """Return the types of at least a fifth of a column's values."""
    return unify([one for one, count in counts.items() if count >= _SHARE * sum(counts.values())], numbers)


def find_sources(settings: DataSettings) -> list[DataSource]:
    """Return every file and hub data set that ``settings.path`` names, in its order; the files of a folder by name.

    Raises:
        DataError: one of the paths names nothing, or a folder holds no data.
    """
    paths = settings.path if isinstance(settings.path, list) else [settings.path or ""]
    sources = []
    for part, name in enumerate(paths or [""]):
        found = locate(name)
        if found is None:
            sources.append(DataSource(name, "hub", part, settings.split, settings.subset))
            continue
        for path in found:
            files = data_files(path, settings.split) if is_dir(path) else [path]
            sources += [DataSource(str(file), _format(file, settings), part, settings.split) for file in files]
    return sources


def _format(path: Path, settings: DataSettings) -> str:
    try:
        return recognize(path) if settings.format == "auto" else settings.format
    except NotTextError as error:
        raise DataError(f"cannot read {path}: {error.message}", error.hint) from None
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", "check the file and its permissions"
        ) from None


def iter_rows(settings: DataSettings) -> Iterator[Record]:
    """Yield the first ``settings.limit`` records of ``settings.path``, the broken ones with their fault.

    Raises:
        DataError: a path names nothing (no file, no folder, no data set of the hub).
    """
    rows = (row for source in find_sources(settings) for row in source.rows())
    return islice(rows, settings.limit)
