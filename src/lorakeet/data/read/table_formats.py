"""Readers of tables with a schema, parquet and arrow, a batch of rows at a time."""

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
#: Times its own size that a file may unpack to, beyond the bytes that any may.
_RATIO, _FREE = 2000, 1 << 28
#: Rows for each byte of a file, beyond the rows that any may have: a value that repeats takes almost none.
_ROWS_PER_BYTE, _FREE_ROWS = 100, 10_000_000
_BUFFER = 1 << 20  # bytes of a column that are read at once; without it, all of its row group are


def table_schema(path: Path, format: str) -> pyarrow.Schema:
    """Return the schema of the file ``path``.

    Raises:
        FaultError: it is not of that ``format``.
    """
    with _as_faults(format):
        if format == "parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                return _decoded(file.schema_arrow)
        with pyarrow.OSFile(str(path)) as source:
            return _decoded(_open_arrow(source).schema)


def _decoded(schema: pyarrow.Schema) -> pyarrow.Schema:
    """Return a schema whose names are UTF-8; others raise an error wherever they are asked for."""
    schema.to_string()
    return schema


def read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield number and values of each row of a parquet file; only of ``columns``, if given."""
    with _as_faults("parquet"), pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        _check_size(file.metadata, path)
        batches = file.iter_batches(_BATCH, columns=outer_columns(columns, file.schema_arrow.names))
        yield from enumerate(_rows(batches, file.schema_arrow), start=1)


def read_arrow(path: Path, columns: Collection[str] | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield number and values of each row of an arrow file or stream; only of ``columns``, if given."""
    with _as_faults("arrow"), pyarrow.OSFile(str(path)) as source:
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
        batch.validate(full=True)  # offsets outside of a buffer would be read otherwise
        yield from records(batch, named)


def _check_size(metadata: pyarrow.parquet.FileMetaData, path: Path) -> None:
    """Check that a parquet file unpacks to no more than tables do.

    Raises:
        pyarrow.ArrowInvalid: It claims more.
    """
    most = max(_FREE, path.stat().st_size * _RATIO)
    unpacked = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if unpacked > most or metadata.num_rows > max(_FREE_ROWS, most // _RATIO * _ROWS_PER_BYTE):
        raise pyarrow.ArrowInvalid(f"{metadata.num_rows:,} rows and {unpacked:,} bytes, expected at most {most:,}")


@contextmanager
def _as_faults(format: str) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FaultError("broken", f"cannot be read as {format}: {reason}") from None


#: Reader of each format; it takes the file and the columns that are needed, if not all.
TABLE_READERS: dict[str, Callable[[Path, Collection[str] | None], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    "parquet": read_parquet,
    "arrow": read_arrow,
}
