"""Repair of data: a copy with every certain fix made, and nothing else changed.

Two passes, in constant memory but for a hash of each row: the first gathers labels and columns, the second writes. The
copy is JSON lines with the columns of the source. Some records are left out:

- records that cannot be read, and rows from which nothing can be learned;
- exact duplicates of an earlier row;
- rows whose texts are in a test or validation file beside the data.

Whatever is uncertain stays as it was. A second repair of the copy changes nothing, with one exception: if the only row
that showed a column not to be misspelt was left out as a duplicate. :mod:`lorakeet.data.doctor.record_fixes` describes
the fixes of one record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lorakeet.config import DataSettings, TaskName, TaskSettings, TrainSettings
from lorakeet.data.doctor.diagnosis import Examination
from lorakeet.data.doctor.duplicates import RepeatIndex, Repeats, hash_inputs
from lorakeet.data.doctor.examine import Progress, examine, task_of
from lorakeet.data.doctor.issues import IssueGroup, Issues
from lorakeet.data.doctor.label_stats import LabelStats
from lorakeet.data.doctor.leakage import other_rows
from lorakeet.data.doctor.record_fixes import FixedRecord, RecordFixer, Values
from lorakeet.data.read.column_types import FLOAT, INT, TypeInference
from lorakeet.data.read.locate import locate
from lorakeet.data.read.record import Record
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import Family, find_layout, merge_layouts
from lorakeet.data.rows.kinds import Kind, Layout, find_kind
from lorakeet.errors import DataError, OutputError
from lorakeet.facts.limits import Limits
from lorakeet.files import write_file
from lorakeet.security.paths import exists, is_dir

#: Rows of a file from which its columns and their types are inferred.
_HEAD = 1000
#: Codes of rows from which nothing can be learned.
_NOTHING = ("nothing_learned", "empty", "null")


@dataclass(frozen=True)
class Repaired:
    """Result of :func:`repair`.

    Attributes:
        path: the copy, of ``written`` rows out of the ``read`` ones.
        mended: fixed rows of the copy by the code of their issue, with their location in the source.
        left_out: records that are not in the copy, likewise.
        remains: examination of the copy.
    """

    path: Path
    read: int
    written: int
    mended: Sequence[IssueGroup]
    left_out: Sequence[IssueGroup]
    remains: Examination

    @property
    def stops(self) -> bool:
        """Whether a run would still be spoilt: by the copy, or by a source that could not be read to its end."""
        return self.remains.stops or any(group.code == "unreadable" for group in self.left_out)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        told = {"mended": self.mended, "left_out": self.left_out, "remains": self.remains.issues}
        return {
            "path": str(self.path),
            "read": self.read,
            "written": self.written,
            **{name: [group.to_dict() for group in groups] for name, groups in told.items()},
            "stops": self.stops,
        }

    def lines(self, colour: bool = False) -> list[str]:
        """Return the lines of the report."""
        lines = [f"repaired   {self.path}: {self.written:,} of {self.read:,} rows"]
        for word, groups in (
            ("mended", self.mended),
            ("left out", self.left_out),
            ("remains", self.remains.issues),
        ):
            for group in groups:
                lines.append(f"{word:<10} {group.count:,} {group.description}")
                lines += [f"           {issue}" for issue in group.first]
                lines += [f"           and {more:,} more"] if (more := group.count - len(group.first)) else []
        if not self.mended and not self.left_out:
            lines.append("nothing was mended")
        return [*lines, f"{self.path}: {self.remains.verdict(colour)}"]


def repair(
    settings: DataSettings,
    task: TaskSettings,
    out: str | Path,
    tokenizer: Any = None,
    *,
    limits: Limits | None = None,
    family: Family | None = None,
    train: TrainSettings | None = None,
    overwrite: bool = False,
    shown: int = 3,
    progress: Progress | None = None,
) -> Repaired:
    """Write a fixed copy of ``settings.path`` to ``out``, and examine the copy.

    Args:
        settings: of the data.
        task: to be trained; ``auto`` is decided by ``family`` and the columns.
        out: a new ``.jsonl`` file.
        tokenizer, limits, family, train: as for :func:`lorakeet.data.doctor.examine.examine`, of the copy.
        overwrite: replace ``out`` if it exists.
        shown: issues of each code that are kept; all are counted.
        progress: called with the number of records read so far.

    Raises:
        DataError: there is no such data, its columns make no rows for the task, its sources have different columns, or
            nothing would be left.
        OutputError: ``out`` is no ``.jsonl`` file, is a part of the data, or exists.
    """
    out = Path(out)
    check_out(settings, out, overwrite=overwrite)
    sources = find_sources(settings)
    name, fixers = _fixers(sources, settings, task, family)
    _survey(sources, fixers, settings, task)
    copy = _Copy(_measured_rows(sources, settings, name, out), shown)
    with write_file(out) as aside:
        with aside.open("wb") as file:
            for source, record in _rows(sources, settings.limit):
                if line := copy.line(record, fixers[source.name]):
                    file.write(line)
                if progress and copy.read % 1000 == 0:
                    progress(copy.read)
        if not copy.written:
            raise DataError(f"nothing is left of {copy.read:,} rows", "`lorakeet doctor` without --fix tells why")
    again = settings.model_copy(update={"path": str(out), "format": "jsonl", "weights": None})
    task = task.model_copy(update={"type": name})
    of_model: dict[str, Any] = {"limits": limits, "family": family}
    remains = examine(again, task, tokenizer, **of_model, train=train, shown=shown, samples=0)
    return Repaired(out, copy.read, copy.written, list(copy.mended), list(copy.left_out), remains)


def check_out(settings: DataSettings, out: Path, *, overwrite: bool = False) -> None:
    """Refuse an ``out`` that is no new ``.jsonl`` file, or that would become a part of the data; reads nothing.

    Raises:
        OutputError: ``out`` is refused.
        DataError: there is no such data.
    """
    if out.suffix.lower() != ".jsonl":
        raise OutputError(f"{out}: the copy is written as JSON lines", f"call it {out.stem or 'fixed'}.jsonl")
    if is_dir(out):
        raise OutputError(f"{out} is a folder, expected a file", "choose another name for the copy")
    for name in settings.path if isinstance(settings.path, list) else [settings.path]:
        for path in locate(name) or ():
            if is_dir(path) and out.resolve().is_relative_to(path.resolve()):
                raise OutputError(
                    f"{out} lies in {path}, whose files are the data", "write the copy beside that folder"
                )
            if exists(out) and out.samefile(path):
                raise OutputError(f"{out} is the data itself", "choose another name for the copy")
    if exists(out) and not overwrite:
        raise OutputError(f"{out} exists", "choose another name for the copy, or --overwrite to replace it")


class _Copy:
    """Records of the copy: fixed or left out, and counted."""

    def __init__(self, measured: RepeatIndex, shown: int) -> None:
        self.mended, self.left_out = Issues(shown), Issues(shown)
        self.read = self.written = 0
        self._measured = measured
        self._written: set[int] = set()  # hashes

    def line(self, record: Record, fixer: RecordFixer) -> bytes | None:
        """Return the line of JSON to write for a record; None if it is left out."""
        self.read += record.location.number > 0
        if record.fault is not None:
            self.left_out.add(record.fault.code, record.location, record.fault.message, record.fault.hint)
            return None
        made = fixer(record)
        if reason := self._reason(made, find_kind(fixer.layout.kind)):
            self.left_out.add(reason[0], record.location, reason[1])
            return None
        for code, words in made.fixes.items():
            self.mended.add(code, record.location, words)
        self.written += 1
        return _line(made.values)

    def _reason(self, made: FixedRecord, kind: Kind) -> tuple[str, str] | None:
        """Return code and message of the reason to leave a record out; None if it stays, as every uncertain one does."""
        if made.canonical is None or made.problems.keys() >= {"misspelt_column", "null"}:
            return None
        if code := next((code for code in _NOTHING if code in made.problems), None):
            return code, made.problems[code]
        inputs = hash_inputs(made.canonical, kind)
        if (first := self._measured.find(inputs)) is not None:
            return "both_sides", f"as {first}"
        if inputs.exact in self._written:
            return "duplicate", "is in the copy already"
        self._written.add(inputs.exact)
        return None


def _fixers(
    sources: Sequence[DataSource], settings: DataSettings, task: TaskSettings, family: Family | None
) -> tuple[TaskName, dict[str, RecordFixer]]:
    """Return the task, and the fixer of each source by its name."""
    name: TaskName = task.type
    layouts: dict[str, Layout] = {}
    for source in sources:
        if types := source.usual_types(list(islice(source.rows(), _HEAD))):
            name = task_of(name, family, types, settings)
            layouts[source.name] = find_layout(types, settings, name, source.name)
    if not layouts:
        raise DataError(f"no record of {', '.join(source.name for source in sources)} can be read", "check data.format")
    merge_layouts(layouts)
    first, *others = layouts.items()
    for other in others:
        _check_alike(first, other)
    cut = settings.learn != "all"
    return name, {
        source.name: RecordFixer(layouts.get(source.name, first[1]), () if source.format == "csv" else None, cut)
        for source in sources
    }


def _check_alike(*named: tuple[str, Layout]) -> None:
    """Check that the rows of two sources can be in one file: each role is in the same column of both."""
    (first, one), (second, other) = named
    roles = one.columns.keys() | other.columns.keys()
    optional = {role for kind in find_kind(one.kind).roles for role in kind.optional}
    unlike = [
        role
        for role in roles
        if one.columns.get(role) != other.columns.get(role)
        and not (role in optional and not (role in one.columns and role in other.columns))
    ]
    if unlike:
        raise DataError(
            f"{first} and {second} have other columns for {', '.join(sorted(unlike))}: one file cannot hold both",
            f"repair them one by one: lorakeet doctor {second} --fix {Path(second).stem}-fixed.jsonl",
        )


def _survey(
    sources: Sequence[DataSource], fixers: Mapping[str, RecordFixer], settings: DataSettings, task: TaskSettings
) -> None:
    """Make the first pass: set in the ``fixers`` what only all rows together show."""
    labels = LabelStats(task)
    numbers = {source.name: TypeInference(numbers=True) for source in sources if source.format == "csv"}
    for source, record in _rows(sources, settings.limit):
        if record.values is None:
            continue
        fixer, label = fixers[source.name], find_kind(fixers[source.name].layout.kind).labels
        if source.name in numbers:
            numbers[source.name].add(record.values)
        beside = fixer.may_be_misspelt(record.values)
        made = fixer(record) if label or beside else None
        if made and made.canonical and not made.problems.keys() & set(_NOTHING):
            fixer.beside |= beside
            if label:
                labels.add(record.location, made.canonical[label])
    for name, fixer in fixers.items():
        fixer.labels, fixer.names = labels.certain(), labels.counts
        if name in numbers:
            fixer.numbers = [
                column for column, types in numbers[name].types().items() if types <= {INT, FLOAT} and types
            ]


def _measured_rows(sources: list[DataSource], settings: DataSettings, task: TaskName, out: Path) -> RepeatIndex:
    """Gather the rows of test and validation files beside the data; an earlier copy is not among them."""
    measured = Repeats()
    for location, inputs in other_rows(sources, settings, task):
        if Path(location.source).resolve() != out.resolve():
            measured.add(inputs)
            measured.locations.append(location)
    return measured.index()


def _rows(sources: Sequence[DataSource], limit: int | None) -> Iterator[tuple[DataSource, Record]]:
    return islice(((source, record) for source in sources for record in source.rows()), limit)


def _line(values: Values) -> bytes:
    """Return one line of JSON in UTF-8. NaN becomes null, and half a character an escape."""
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        values = _without_nan(values)
        text = json.dumps(values, ensure_ascii=False, default=str)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(values, default=str)}\n".encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
