"""CSV rows as spreadsheets and data frames write them: each record with the line it begins on.

- Fields are separated by comma, semicolon, tab or ``|``, whichever the header has most of outside of quotation marks; a
  first line ``sep=;`` states it.
- The header is the first line with a name in it. Blanks around its names are dropped; where one begins with a blank, the
  blanks after each separator are no part of a field.
- A column without a name is left out where it is empty, and is called ``Unnamed: 2`` (counted from 0) where it is not.
- Rows without any content at the end are left out, like blank lines.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from lorakeet.data.read.record import Fault, FaultError

#: Characters of a field; a longer one comes of a quotation mark that is never closed.
_LONGEST_FIELD = 1 << 26
_SEPARATORS = ",;\t|"
_QUOTED = re.compile(r'"[^"]*"')
_Check = Callable[[str], Fault | None]
#: First line that tells a spreadsheet the separator.
_STATED = re.compile(r'"?sep=(.)"?\n?', re.IGNORECASE)


class _Dialect(NamedTuple):
    """Style in which fields are written.

    Attributes:
        separator: Between fields.
        blanks: Whether blanks follow a separator that are no part of a field.
        skipped: Lines above the header.
        header: First line of the header.
    """

    separator: str
    blanks: bool
    skipped: int
    header: str


def parse_table(
    lines: Iterator[str], fault_of: _Check, *, tabs: bool = False
) -> Iterator[tuple[int, Mapping[str, str] | Fault]]:
    """Yield line and fields by name, or line and fault, of the records in the ``lines`` of a CSV file.

    Args:
        lines: Of the file, each with its line feed.
        fault_of: Returns the fault of a text as it was read.
        tabs: A tab in the header is the separator, whatever else there is.

    Raises:
        FaultError: The header is broken or has a name twice.
    """
    dialect = _dialect(lines, tabs)
    reader = csv.reader(
        chain([dialect.header], lines),
        delimiter=dialect.separator,
        skipinitialspace=dialect.blanks,
        strict=True,
    )
    names: list[str] = []
    empty: list[tuple[int, dict[str, str]]] = []  # rows without content, which may be the last ones
    start = 1 + dialect.skipped  # line that a record begins on; it ends on a later one where a field holds line breaks
    while (fields := _next_fields(reader)) is not None:
        if not names and fields:
            names = _header(fields, start, fault_of)
        elif fields:
            found = fields if isinstance(fields, Fault) else fault_of("".join(fields)) or _record(fields, names)
            if isinstance(found, dict) and len(names) > 1 and not any(map(str.strip, found.values())):
                empty.append((start, found))
            else:
                yield from empty
                empty.clear()
                yield start, found
        start = reader.line_num + 1 + dialect.skipped


def _dialect(lines: Iterator[str], tabs: bool) -> _Dialect:
    """Read up to the first line of the header, and infer from it how fields are written."""
    stated, skipped, line = "", 0, ""
    for line in lines:
        match = _STATED.fullmatch(line)
        if match and not stated:
            stated = match[1]
        elif line.strip(_SEPARATORS + ' "\n'):
            break
        skipped += 1
    bare = _QUOTED.sub("quoted", line)
    separator = "\t" if tabs and "\t" in bare else stated or max(_SEPARATORS, key=bare.count)
    return _Dialect(separator, bool(re.search(f"{re.escape(separator)} +[^ \n]", bare)), skipped, line)


def _next_fields(reader: Any) -> list[str] | Fault | None:
    """Return the next record of a CSV reader; None at the end. A text may be longer than the 128 KiB that csv allows."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return next(reader, None)
    except csv.Error as error:
        return Fault("broken", f"not CSV: {error}", "is a quotation mark open, or one inside of a text not doubled?")
    finally:
        csv.field_size_limit(limit)


def _header(fields: list[str] | Fault, line: int, fault_of: _Check) -> list[str]:
    """Return the names of the columns, empty where a column has none."""
    names = [] if isinstance(fields, Fault) else [name.strip() for name in fields]
    if fault := fields if isinstance(fields, Fault) else fault_of("".join(fields)):
        raise FaultError(fault.code, f"line {line}: {fault.message}", fault.hint)
    if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
        raise FaultError(
            "broken", f"line {line}: a header with the same name twice: {', '.join(twice)}", "rename one of the two"
        )
    return names


def _record(fields: list[str], names: list[str]) -> dict[str, str] | Fault:
    """Return the fields by name; separators at the end of a row, and columns without name and content, are nothing."""
    count = len(fields)
    while count > len(names) and not fields[count - 1].strip():
        count -= 1
    if count != len(names):
        hint = 'quote a text that holds the separator: "a, b"'
        return Fault("broken", f"{count} field{'s' * (count != 1)}, expected {len(names)} as in the header", hint)
    return dict(_named(names, fields))


def _named(names: list[str], fields: Iterable[str]) -> Iterator[tuple[str, str]]:
    for number, (name, field) in enumerate(zip(names, fields, strict=False)):
        if name:
            yield name, field
        elif field.strip():
            yield f"Unnamed: {number}", field
