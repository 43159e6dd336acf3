"""File formats: recognize the format of a file, and read its records one at a time.

| format  | suffix                 | records                                                                          |
|---------|------------------------|----------------------------------------------------------------------------------|
| json    | .json                  | a list of objects or strings, alone or under a key (the split, or the only list) |
| jsonl   | .jsonl .ndjson         | one object or string a line                                                      |
| yaml    | .yaml .yml             | the mappings of a list                                                           |
| csv     | .csv .tsv              | one a line below the header (:mod:`lorakeet.data.read.csv_rows`)                     |
| parquet | .parquet               | one a row; only the columns that are needed are read                             |
| arrow   | .arrow                 | the same; a file or a stream, as ``datasets`` writes it                          |
| text    | .txt .text .md         | paragraphs between blank lines; without any blank line, one a line               |
| fortune | none, or any of text's | quotations between lines of a single ``%`` (:mod:`lorakeet.data.read.fortune`)        |

The readers of text are in :mod:`~lorakeet.data.read.text_formats`, those of tables in
:mod:`~lorakeet.data.read.table_formats`. A text file may be compressed (``.jsonl.gz``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakeet.data.read.fortune import DELIMITER
from lorakeet.data.read.record import Fault, FaultError, Location, Record, Unit, faults_error
from lorakeet.data.read.table_formats import TABLE_READERS
from lorakeet.data.read.text_formats import TEXT_READERS, is_json
from lorakeet.security.paths import is_file
from lorakeet.text_files import NotTextError, preview

SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}  # the last: an arrow stream
_PREVIEW_BYTES = 1 << 20  # bytes that a format is recognised by


def suffix(path: Path) -> str:
    """Return the suffix of ``path`` in lower case, without that of compression."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.suffix.lower()


def recognize(path: Path) -> str:
    """Return the format of ``path``: by suffix, else by content. ``%`` lines make any text a fortune file.

    Raises:
        OSError: the file cannot be read.
    """
    known = SUFFIXES.get(suffix(path))
    if known not in (None, "text"):
        return known
    head, text = preview(path, _PREVIEW_BYTES)
    for mark, format in _MAGIC.items():
        if head.startswith(mark):
            return format
    if DELIMITER.search(text):
        return "fortune"
    if known is None and text.lstrip()[:1] in ("{", "["):
        return "jsonl" if is_json(text.lstrip().partition("\n")[0]) else "json"
    return "text"


def read_file(
    path: Path, format: str = "auto", split: str = "train", columns: Collection[str] | None = None
) -> Iterator[Record]:
    """Yield the records of ``path``; one that cannot be read has a fault, and reading goes on.

    A file that cannot be read at all, or holds nothing, gives one record with a fault (``unreadable``) and number 0.

    Args:
        path: the file.
        format: one of the formats above, or ``auto``.
        split: the list to take from a JSON file of several.
        columns: the columns that are needed; formats that cannot skip a column give all of them.
    """
    source, empty = str(path), True
    unit: Unit = "line"
    try:
        format = recognize(path) if format == "auto" else format
        unit = "row" if format in ("json", *TABLE_READERS) else "line"
        read = TABLE_READERS[format](path, columns) if format in TABLE_READERS else TEXT_READERS[format](path, split)
        for number, found in read:
            empty = False
            if isinstance(found, Fault):
                yield Record(Location(source, number, unit), None, found)
            else:
                yield Record(Location(source, number, unit), found)
    except FaultError as error:
        yield _unreadable(source, unit, error.fault.message, error.fault.hint)
    except NotTextError as error:
        yield _unreadable(source, unit, error.message, error.hint)
    except OSError as error:
        yield _unreadable(source, unit, f"cannot be read: {error.strerror or error}")
    else:
        if empty:
            yield _unreadable(source, unit, f"empty, no {'quotation' if format == 'fortune' else 'row'} in it")


def read_inputs(path: Path, column: str) -> list[tuple[Location, Mapping[str, Any]]]:
    """Return location and values of the records for a model to answer; of a text file, each line as ``column``.

    Blank lines are left out.

    Args:
        path: the file, in any of the formats above.
        column: that holds the text.

    Raises:
        DataError: it cannot be read, holds nothing, or one of its records is broken.
    """
    format = SUFFIXES.get(suffix(path)) or (recognize(path) if is_file(path) else "text")
    plain = format in ("text", "fortune")
    records = list(read_file(path, "lines" if plain else format))
    if faults := [(record.location, record.fault) for record in records if record.fault]:
        raise faults_error(faults)
    found = [(record.location, record.values) for record in records if record.values is not None]
    return [(location, {column: values["text"]} if plain else values) for location, values in found]


def _unreadable(source: str, unit: Unit, message: str, hint: str | None = None) -> Record:
    return Record(Location(source, 0, unit), None, Fault("unreadable", message, hint))
