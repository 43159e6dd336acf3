"""File formats: each reader makes a :class:`Table` of one file, and complains with the file's name and line.

| format  | suffix                 | rows                                                                             |
|---------|------------------------|----------------------------------------------------------------------------------|
| json    | .json                  | a list of objects or strings, alone or under a key (the split, or the only list) |
| jsonl   | .jsonl .ndjson         | one object or string a line                                                      |
| csv     | .csv .tsv              | one a line below the header, which shows whether by comma, semicolon or tab      |
| parquet | .parquet               | one a row; only the column that is needed is read                                |
| text    | .txt .text .md         | paragraphs between blank lines; without any blank line, one a line               |
| fortune | none, or any of text's | quotations between lines of a single ``%`` (:mod:`lorakeet.data.fortune`)        |

Text is UTF-8, with or without a byte order mark; every other encoding is an error, never a guess.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from lorakeet.data.fortune import DELIMITER, is_rotated, parse_fortunes
from lorakeet.errors import DataError

SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_HEAD = 1 << 20  # bytes that are looked at to recognise a format
_SHOWN = 3  # complaints of one kind that are written out; the rest are counted


@dataclass(frozen=True)
class Table:
    """The rows of one source before a text column is chosen.

    Attributes:
        source: name for messages.
        format: one of the formats above, or ``hub``.
        types: type of the values by column, in the order of the file; ``str`` where all are text or null.
        values: the values of a column, read when asked for.
        places: where each row stands, counted in ``unit`` from 1.
        unit: ``line`` or ``row``.
    """

    source: str
    format: str
    types: Mapping[str, str]
    values: Callable[[str], Sequence[Any]]
    places: Sequence[int]
    unit: str = "line"


def recognise(path: Path) -> str:
    """The format of ``path``: by suffix, but ``%`` lines make any text a fortune file; without a suffix, by content.

    Raises:
        DataError: the file cannot be read.
    """
    known = SUFFIXES.get(path.suffix.lower())
    if known not in (None, "text"):
        return known
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.decode("utf-8", errors="replace")
    if DELIMITER.search(text.replace("\r\n", "\n")):
        return "fortune"
    if known is None and text.lstrip()[:1] in ("{", "["):
        return "jsonl" if _is_json(text.lstrip().partition("\n")[0]) else "json"
    return "text"


def read_table(path: Path, format: str = "auto", split: str = "train") -> Table:
    """Read the file ``path``.

    Raises:
        DataError: it cannot be read, is empty, is not of its format (every broken line is counted, the first ones are
            named), or is not UTF-8.
    """
    format = recognise(path) if format == "auto" else format
    table = _parquet(path) if format == "parquet" else _READERS[format](path, _read_text(path), split)
    if not table.places:
        raise DataError(f"{path} is empty: no {'quotation' if format == 'fortune' else 'row'} in it")
    return table


def some(complaints: Sequence[str]) -> str:
    """The first few complaints in one phrase, and how many more there are."""
    shown = "; ".join(complaints[:_SHOWN])
    return shown + (f"; and {len(complaints) - _SHOWN} more" if len(complaints) > _SHOWN else "")


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16, expected UTF-8", f"convert it: iconv -f UTF-16 -t UTF-8 {path}")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise DataError(f"{path}, line {line}: a zero byte, expected UTF-8 text", "is this a text file at all?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8",
            f"convert it, e.g. iconv -f WINDOWS-1252 -t UTF-8 {path}",
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json(path: Path, text: str, split: str) -> Table:
    try:
        value = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        if _is_json(text.lstrip().partition("\n")[0]):  # one value a line: .json by name only
            return _jsonl(path, text, split)
        raise DataError(f"{path} is not JSON: {error}") from None
    key = "text"
    if isinstance(value, dict):
        lists = [name for name, inner in value.items() if isinstance(inner, list)]
        if split not in lists and len(lists) != 1:
            raise DataError(f"{path} holds an object with {len(lists)} lists ({', '.join(lists)}), expected one list")
        key = split if split in lists else lists[0]
        value = value[key]
    if not isinstance(value, list):
        raise DataError(f"{path} holds {type(value).__name__}, expected a list of objects")
    return _records(path, "json", value, range(1, len(value) + 1), "row")


def _jsonl(path: Path, text: str, split: str) -> Table:
    records, places, broken = [], [], []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
            places.append(number)
        except json.JSONDecodeError as error:
            broken.append(f"line {number}: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
            broken.append(f"line {number}: {error}")
    if broken:
        raise DataError(f"{path} is not JSON in {some(broken)}", 'each line must be one object, e.g. {"text": "…"}')
    return _records(path, "jsonl", records, places, "line")


def _records(path: Path, format: str, records: Sequence[Any], places: Sequence[int], unit: str) -> Table:
    """A table of objects with keys, which need not be the same in each, or of strings."""
    if records and all(isinstance(record, str) for record in records):
        return _in_memory(path, format, {"text": records}, places, unit)
    wrong = [
        f"{unit} {place} holds {type(record).__name__}"
        for place, record in zip(places, records, strict=True)
        if not isinstance(record, dict)
    ]
    if wrong:
        raise DataError(f"{path}: {some(wrong)}; expected an object with a text in it")
    names = dict.fromkeys(name for record in records for name in record)
    return _in_memory(path, format, {name: [record.get(name) for record in records] for name in names}, places, unit)


def _csv(path: Path, text: str, split: str) -> Table:
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    limit = csv.field_size_limit(sys.maxsize)  # a text may well be longer than csv's 128 KiB
    rows: list[tuple[int, list[str]]] = []
    start = 1  # line that a row begins on; it ends on a later one where a text holds line breaks
    try:
        reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for row in reader:
            if row:
                rows.append((start, row))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: not CSV from here on: {error}", "is a quotation mark open?") from None
    finally:
        csv.field_size_limit(limit)
    names = rows.pop(0)[1] if rows else []
    if len(set(names)) < len(names):
        raise DataError(f"{path} has a header with the same name twice: {', '.join(names)}")
    wrong = [f"line {line} has {len(row)}" for line, row in rows if len(row) != len(names)]
    if wrong:
        hint = 'quote a text that holds the separator: "a, b"'
        raise DataError(f"{path}: {some(wrong)} fields; expected {len(names)} as in its header", hint)
    columns = {name: [row[at] for _, row in rows] for at, name in enumerate(names)}
    types = {name: "number" if all(map(_is_number, values)) else "str" for name, values in columns.items()}
    return Table(str(path), "csv", types, columns.__getitem__, [line for line, _ in rows])


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as parquet: {str(error).splitlines()[0]}") from None
    types = {field.name: "str" if _holds_text(field.type) else str(field.type) for field in file.schema_arrow}

    def values(name: str) -> list[Any]:
        return file.read(columns=[name])[name].to_pylist()

    return Table(str(path), "parquet", types, values, range(1, file.metadata.num_rows + 1), "row")


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _text(path: Path, text: str, split: str) -> Table:
    by_line = not re.search(r"\n[ \t]*\n", text.strip())
    texts: list[str] = []
    places: list[int] = []
    inside = False  # a paragraph that goes on
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip()
        if inside and line:
            texts[-1] += "\n" + line
        elif line:
            texts.append(line)
            places.append(number)
        inside = bool(line) and not by_line
    return _in_memory(path, "text", {"text": texts}, places)


def _fortune(path: Path, text: str, split: str) -> Table:
    quotations = parse_fortunes(codecs.decode(text, "rot13") if is_rotated(path) else text)
    columns: dict[str, Sequence[Any]] = {
        "text": [item.text for item in quotations],
        "author": [item.author for item in quotations],
    }
    return _in_memory(path, "fortune", columns, [item.line for item in quotations])


def _in_memory(
    path: Path, format: str, columns: Mapping[str, Sequence[Any]], places: Sequence[int], unit: str = "line"
) -> Table:
    types = {}
    for name, values in columns.items():
        types[name] = " or ".join(sorted({type(value).__name__ for value in values if value is not None})) or "null"
    return Table(str(path), format, types, columns.__getitem__, places, unit)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


_READERS: dict[str, Callable[[Path, str, str], Table]] = {
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
    "text": _text,
    "fortune": _fortune,
}
