"""Readers of text files: each yields number and values, or number and fault, of the records of one file.

They run in constant memory; only JSON and YAML files are read whole. Text is UTF-8, with or without a byte order mark; every
other encoding is a fault, never a guess. Lines end as on any system.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import IO, Any

from lorakeet.data.read.fortune import is_rotated, parse_fortunes
from lorakeet.data.read.record import Fault, FaultError
from lorakeet.data.read.yaml_rows import parse_rows

#: Number of a record, and its values by column or its fault.
Read = tuple[int, Mapping[str, Any] | Fault]

_LONGEST_FIELD = 1 << 26  # characters of a CSV field; a longer one comes of a quotation mark that is never closed
_DECODER = json.JSONDecoder()
_AS_JSON = 'each line must be one object, e.g. {"text": "…"}'


def open_plain(path: Path) -> IO[bytes]:
    """Open ``path`` to read its bytes, unpacked if its name ends in ``.gz``."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


#: First bytes of files that are no text -> what they are, and what to do.
OTHER_FILES = {
    b"%PDF": ("a PDF document", "extract its text first, for example with pdftotext"),
    b"\x89PNG": ("a picture (PNG)", "give text; text in a picture must be recognized (OCR) first"),
    b"\xff\xd8\xff": ("a picture (JPEG)", "give text; text in a picture must be recognized (OCR) first"),
    b"GIF8": ("a picture (GIF)", "give text; text in a picture must be recognized (OCR) first"),
    b"PK\x03\x04": ("a zip archive, as documents of Word and Excel are", "unpack it, or save its text as .txt or .csv"),
    b"\xd0\xcf\x11\xe0": ("a document of an old Word or Excel", "save its text as .txt or .csv"),
    b"{\\rtf": ("a document in rich text", "save its text as .txt"),
    b"SQLite format 3": ("a database (SQLite)", "export its table as .csv or .jsonl"),
    b"RIFF": ("sound, a film or a picture", "give text"),
    b"ID3": ("sound (MP3)", "give text; speech must be transcribed first"),
}


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of ``path`` with their ``\\n``; other bytes than UTF-8 become half characters (:func:`encoding_fault`).

    Raises:
        Fault: it is UTF-16.
    """
    with open_plain(path) as file:
        start = file.read(max(map(len, OTHER_FILES)))
        for mark, (kind, hint) in OTHER_FILES.items():
            if start.startswith(mark):
                raise FaultError("encoding", f"{kind}, expected text", hint)
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise FaultError("encoding", "UTF-16, expected UTF-8", f"convert it: iconv -f UTF-16 -t UTF-8 {path}")
        file.seek(0)
        with TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape") as text:
            yield from text


def encoding_fault(text: str, path: Path) -> Fault | None:
    """Return the fault of a ``text`` read from ``path`` that is not UTF-8 text; None if it is."""
    if "\0" in text:
        return Fault("encoding", "a zero byte, expected UTF-8 text", "is this a text file at all?")
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "surrogateescape" writes byte 0x80 as U+DC80
        byte = ord(text[error.start]) - 0xDC00
        hint = f"convert it, e.g. iconv -f WINDOWS-1252 -t UTF-8 {path}"
        return Fault("encoding", f"byte 0x{byte:02x} is not UTF-8", hint)
    return None


def _all_lines(path: Path) -> list[str]:
    """Return the lines of ``path``.

    Raises:
        FaultError: one of them is not UTF-8 text.
    """
    lines = []
    for number, line in enumerate(read_lines(path), start=1):
        if fault := encoding_fault(line, path):
            raise FaultError(fault.code, f"line {number}: {fault.message}", fault.hint)
        lines.append(line)
    return lines


def is_json(text: str) -> bool:
    """Whether ``text`` is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _jsonl(path: Path, split: str) -> Iterator[Read]:
    as_object = _Records()
    for number, line in enumerate(read_lines(path), start=1):
        if line.isspace():
            continue
        try:
            yield number, encoding_fault(line, path) or as_object(_parse_line(line))
        except json.JSONDecodeError as error:
            yield number, Fault("broken", f"not JSON: {error.msg} at column {error.colno}", _AS_JSON)
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
            yield number, Fault("broken", f"not JSON: {error}", _AS_JSON)


def _parse_line(line: str) -> Any:
    """Return the JSON value of ``line`` as ``json.loads`` does, in a third of the time where nothing stands around it.

    Raises:
        ValueError, RecursionError: as ``json.loads``.
    """
    try:
        value, end = _DECODER.raw_decode(line)
    except json.JSONDecodeError:
        return json.loads(line)  # blanks in front, or an error, which it words
    return value if line[end:] in ("\n", "") else json.loads(line)


def _json(path: Path, split: str) -> Iterator[Read]:
    lines = _all_lines(path)
    text = "".join(lines)
    try:
        value = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        if not is_json(next(filter(str.strip, lines))):
            raise FaultError("broken", f"not JSON: {error}") from None
        yield from _jsonl(path, split)  # one value a line: .json by name only
        return
    yield from enumerate(map(_Records(), _only_list(value, split)), start=1)


def _only_list(value: Any, split: str) -> list[Any]:
    """Return the list of records in a JSON file: the whole value, its member ``split`` or its only list."""
    if isinstance(value, dict):
        lists = {name: inner for name, inner in value.items() if isinstance(inner, list)}
        if split not in lists and len(lists) != 1:
            raise FaultError("broken", f"an object with {len(lists)} lists ({', '.join(lists)}), expected one list")
        value = lists[split] if split in lists else next(iter(lists.values()))
    if not isinstance(value, list):
        raise FaultError("broken", f"holds {type(value).__name__}, expected a list of objects")
    return value


class _Records:
    """Converter of the JSON values of a file to records: all of them objects, or all of them strings."""

    def __init__(self) -> None:
        self._texts: bool | None = None

    def __call__(self, value: Any) -> Mapping[str, Any] | Fault:
        if self._texts is None and isinstance(value, (str, dict)):
            self._texts = isinstance(value, str)
        if isinstance(value, str) and self._texts:
            return {"text": value}
        if isinstance(value, dict) and not self._texts:
            return value
        expected = "a string like the first" if self._texts else "an object"
        return Fault("broken", f"holds {type(value).__name__}, expected {expected}", _AS_JSON)


def _yaml(path: Path, split: str) -> Iterator[Read]:
    yield from parse_rows(_all_lines(path))


def _csv(path: Path, split: str) -> Iterator[Read]:
    lines = read_lines(path)
    first = next(lines, "")
    reader = csv.reader(chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
    names: list[str] = []
    start = 1  # line that a record begins on; it ends on a later one where a field holds line breaks
    while (fields := _next_fields(reader)) is not None:
        if not names and fields:
            if isinstance(fields, Fault):
                raise FaultError(fields.code, f"line {start}: {fields.message}", fields.hint)
            names = _header(fields, path)
        elif fields:
            yield start, fields if isinstance(fields, Fault) else _fields(fields, names, path)
        start = reader.line_num + 1


def _next_fields(reader: Any) -> list[str] | Fault | None:
    """Return the next record of a CSV reader; None at the end. A text may be longer than the 128 KiB that csv allows."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return next(reader, None)
    except csv.Error as error:
        return Fault("broken", f"not CSV: {error}", "is a quotation mark open, or one inside of a text not doubled?")
    finally:
        csv.field_size_limit(limit)


def _header(names: list[str], path: Path) -> list[str]:
    if fault := encoding_fault("".join(names), path):
        raise FaultError(fault.code, fault.message, fault.hint)
    if len(set(names)) < len(names):
        raise FaultError("broken", f"a header with the same name twice: {', '.join(names)}")
    return names


def _fields(fields: list[str], names: list[str], path: Path) -> Mapping[str, Any] | Fault:
    if len(fields) != len(names):
        hint = 'quote a text that holds the separator: "a, b"'
        return Fault(
            "broken", f"{len(fields)} field{'s' * (len(fields) != 1)}, expected {len(names)} as in the header", hint
        )
    return encoding_fault("".join(fields), path) or dict(zip(names, fields, strict=True))


def _text(path: Path, split: str) -> Iterator[Read]:
    by_line = not _has_paragraphs(read_lines(path))
    start, paragraph = 0, ""
    for number, line in enumerate(chain(read_lines(path), [""]), start=1):
        line = line.rstrip()
        if paragraph and line and not by_line:
            paragraph += "\n" + line
            continue
        if paragraph:
            yield start, encoding_fault(paragraph, path) or {"text": paragraph}
        start, paragraph = number, line


def _has_paragraphs(lines: Iterable[str]) -> bool:
    """Whether a blank line stands between others."""
    begun = blank = False
    for line in lines:
        if line.isspace():
            blank = begun
        elif blank:
            return True
        else:
            begun = True
    return False


def _fortune(path: Path, split: str) -> Iterator[Read]:
    lines = read_lines(path)
    if is_rotated(path):
        lines = (codecs.decode(line, "rot13") for line in lines)
    for item in parse_fortunes(lines):
        yield item.line, encoding_fault(item.text, path) or {"text": item.text, "author": item.author}


#: Reader of each format; it takes the file, and which list to take from a JSON file of several.
TEXT_READERS: dict[str, Callable[[Path, str], Iterator[Read]]] = {
    "json": _json,
    "jsonl": _jsonl,
    "yaml": _yaml,
    "csv": _csv,
    "text": _text,
    "fortune": _fortune,
}
