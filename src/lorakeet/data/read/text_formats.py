"""Readers of text files: each yields number and values, or number and fault, of the records of one file.

They run in constant memory; only JSON and YAML files are read whole. :mod:`lorakeet.text_files` reads the lines.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lorakeet.data.read.csv_rows import parse_table
from lorakeet.data.read.fortune import is_rotated, parse_fortunes
from lorakeet.data.read.record import Fault, FaultError
from lorakeet.data.read.yaml_rows import parse_rows
from lorakeet.text_files import all_lines, encoding_problem, read_lines

#: Number of a record, and its values by column or its fault.
Read = tuple[int, Mapping[str, Any] | Fault]

_DECODER = json.JSONDecoder()
_AS_JSON = 'each line must be one object, e.g. {"text": "…"}'


def encoding_fault(text: str, path: Path) -> Fault | None:
    """Return the fault of a ``text`` read from ``path`` that is not UTF-8 text; None if it is."""
    problem = encoding_problem(text, path)
    return problem and Fault("encoding", *problem)


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
    lines = all_lines(path)
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
    yield from parse_rows(all_lines(path))


def _csv(path: Path, split: str) -> Iterator[Read]:
    tabs = ".tsv" in map(str.lower, path.suffixes)
    yield from parse_table(read_lines(path), partial(encoding_fault, path=path), tabs=tabs)


def _lines(path: Path, split: str) -> Iterator[Read]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.isspace():
            yield number, encoding_fault(line, path) or {"text": line.removesuffix("\n")}


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
    "lines": _lines,
    "fortune": _fortune,
}
