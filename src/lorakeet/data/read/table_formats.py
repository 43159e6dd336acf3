"""Readers of tables, files that know the types of their columns: parquet and arrow, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lorakeet.data.read.column_types import class_names, outer_columns, records
from lorakeet.data.read.record import FaultError

_BATCH = 1024  # rows of a parquet file that are decoded at once
_BUFFER = 1 << 20  # bytes of a column that are read at once; without it, all of its row group are


def table_schema(path: Path, format: str) -> pyarrow.Schema:
    """The schema of the file ``path``.

    Raises:
        FaultError: it is not of that ``format``.
    """
    with _said(format):
        if format == "parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                return file.schema_arrow
        with pyarrow.OSFile(str(path)) as source:
            return _open_arrow(source).schema


def read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and values of each row of a parquet file; only of ``columns``, if given."""
    with _said("parquet"), pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        batches = file.iter_batches(_BATCH, columns=outer_columns(columns, file.schema_arrow.names))
        yield from enumerate(_rows(batches, file.schema_arrow), start=1)


def read_arrow(path: Path, columns: Collection[str] | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and values of each row of an arrow file or stream; only of ``columns``, if given."""
    with _said("arrow"), pyarrow.OSFile(str(path)) as source:
        reader = _open_arrow(source)
        kept = outer_columns(columns, reader.schema.names)
        batches = (batch.select(kept) for batch in _batches(reader))
        yield from enumerate(_rows(batches, reader.schema), start=1)


def _open_arrow(source: Any) -> Any:
    try:
        return pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_stream(source)


def _batches(reader: Any) -> Iterator[pyarrow.RecordBatch]:
    if isinstance(reader, pyarrow.ipc.RecordBatchFileReader):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _rows(batches: Iterator[pyarrow.RecordBatch], schema: pyarrow.Schema) -> Iterator[dict[str, Any]]:
    named = class_names(schema)
    for batch in batches:
        yield from records(batch, named)


@contextmanager
def _said(format: str) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise FaultError("broken", f"cannot be read as {format}: {str(error).strip().splitlines()[0]}") from None


#: Readers by format; each takes the file and the columns that are needed, if not all.
TABLE_READERS: dict[str, Callable[[Path, Collection[str] | None], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    "parquet": read_parquet,
    "arrow": read_arrow,
}
