"""Fortune files: quotations between lines of a single ``%``, with the author after ``-- `` (fortune(6), strfile(1)).

The text of a quotation stays as written, line breaks and indentation included. Three things are cleaned, because a
model should not be trained to write them:

- an attribution, however far it was indented and over however many lines it ran, becomes one line ``-- Author``;
- overstrikes of paper terminals (``_\\b`` for underlining, ``'\\be`` for é) become the letter they were printed for;
- blanks at the ends of lines, blank lines around a quotation and comments (lines that begin with ``%%``) are dropped.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lorakeet.security.paths import file_problem, is_file

DELIMITER = re.compile(r"^%[ \t]*$", re.MULTILINE)
_DASHED = re.compile(r"([ \t]*)--[ \t]+\S.*")
_OVERSTRIKE = re.compile(r"(.)\x08(.?)")
_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303", ",": "\u0327"}
_ROTATED = 0x4  # strfile's flag: every letter is moved by 13 places, as a warning of offensive text


@dataclass(frozen=True)
class Quotation:
    """Quotation: the ``line`` it begins on (from 1), its clean ``text`` and the last ``author`` in it, if any."""

    line: int
    text: str
    author: str | None


def parse_fortunes(lines: Iterable[str]) -> Iterator[Quotation]:
    """Yield the quotations in the ``lines`` of a fortune file, in order; skip empty ones."""
    record: list[str] = []
    start = 1  # line that the record begins on
    for number, line in enumerate(chain(lines, "%"), start=1):
        line = line.rstrip("\n")
        if not DELIMITER.match(line):
            record.append("" if line.startswith("%%") else _printed(line).rstrip())
            continue
        if any(record):
            yield _quotation(record, start)
        record, start = [], number + 1


def _quotation(record: list[str], start: int) -> Quotation:
    first = next(at for at, row in enumerate(record) if row)
    while not record[-1]:
        record.pop()
    return Quotation(start + first, *_attributed(record[first:]))


def indexed_by(path: Path) -> Path | None:
    """Return the fortune file that ``path`` is the index of: strfile(1) appends ``.dat`` to its name."""
    return file if path.suffix == ".dat" and is_file(file := path.with_suffix("")) else None


def is_rotated(path: Path) -> bool:
    """Whether the letters of ``path`` are rotated by 13 places, by its index."""
    name = f"{path.name}.dat"
    try:
        if file_problem(path.parent, name):
            return False
        with path.with_name(name).open("rb") as file:
            header = file.read(24)  # big-endian words of 4 bytes: version, count, longest, shortest, flags, delimiter
    except OSError:
        return False
    return len(header) == 24 and bool(int.from_bytes(header[16:20], "big") & _ROTATED)


def _printed(row: str) -> str:
    """Return ``row`` as paper showed it: of two overstruck signs the second, with the first as its accent if it is one."""

    def struck(match: re.Match[str]) -> str:
        below, above = match.groups()
        composed = unicodedata.normalize("NFC", above + _ACCENTS.get(below, ""))
        return composed if len(composed) == 1 else above

    return _OVERSTRIKE.sub(struck, row).replace("\x08", "") if "\x08" in row else row


def _attributed(lines: list[str]) -> tuple[str, str | None]:
    """Return the text with each attribution on one clean line, and the last attribution."""
    text: list[str] = []
    author = None
    at = 0
    while at < len(lines):
        end = _dashed_end(lines, at)
        if _is_attribution(lines, at, end):
            author = " ".join(" ".join(lines[at:end]).split()).removeprefix("-- ")
            text.append(f"-- {author}")
        else:
            text += lines[at:end]
        at = end
    return "\n".join(text), author


def _dashed_end(lines: list[str], at: int) -> int:
    """Return the end of the dashed lines at ``at``: a dash with all lines indented at least as far, or a single line."""
    match = _DASHED.fullmatch(lines[at])
    end = at + 1
    while match and match[1] and end < len(lines) and lines[end] and _width(lines[end]) >= _width(match[1]):
        end += 1
    return end


def _is_attribution(lines: list[str], at: int, end: int) -> bool:
    """Whether ``lines[at:end]`` say who said what stands before them, rather than being prose, a heading or a list."""
    dashes = sum(bool(_DASHED.fullmatch(row)) for row in lines[at:end])
    if at == 0 or dashes not in (1, 2):  # a heading comes first; the items of a list follow each other
        return False
    indented = lines[at][0] != "-"  # flush left, prose that is broken before a dash looks the same
    return indented or (end == len(lines) and sum(row.startswith("-- ") for row in lines) == 1)


def _width(row: str) -> int:
    """Return the columns of white space that ``row`` begins with, tabs at every eighth."""
    row = row.expandtabs()
    return len(row) - len(row.lstrip())
