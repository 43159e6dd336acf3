"""A copy of data in which everything is mended that can be mended with certainty, and nothing else is changed.

Two passes, in constant memory but for a hash of each row: the first gathers labels and columns, the second writes. The
copy is JSON lines with the columns of the source. Left out of it are records that cannot be read, rows without anything
to learn, exact repetitions of an earlier row, and rows whose inputs stand in a test or validation file beside the data.
What is not certain stays as it was. A copy that is repaired again stays as it is, unless the one row that showed a
column not to be misspelt was left out as a repetition. See :mod:`lorakeet.data.doctor.record_fixes` for what is done to one record.
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
from lorakeet.data.doctor.duplicates import Repeats, exact_hash
from lorakeet.data.doctor.examine import Progress, examine, task_of
from lorakeet.data.doctor.issues import Finding, Findings
from lorakeet.data.doctor.label_stats import Labels
from lorakeet.data.doctor.leakage import other_rows
from lorakeet.data.doctor.record_fixes import Mended, Mender, Values
from lorakeet.data.read.column_types import FLOAT, INT, TypeInference
from lorakeet.data.read.locate import locate
from lorakeet.data.read.record import Record
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import Family, find_layout, merge_layouts
from lorakeet.data.rows.kinds import Layout, find_kind
from lorakeet.errors import DataError, OutputError
from lorakeet.files import write_file

_HEAD = 1000  # rows that tell the columns of a file and their types
_NOTHING = ("nothing_learned", "empty", "null")


@dataclass(frozen=True)
class Repaired:
    """What :func:`repair` did.

    Attributes:
        path: the copy, of ``written`` rows out of the ``read`` ones.
        mended: rows of the copy in which something was mended, by the kind of problem, with their place in the source.
        left_out: records that are not in the copy, likewise.
        remains: what the doctor finds in the copy.
    """

    path: Path
    read: int
    written: int
    mended: Sequence[Finding]
    left_out: Sequence[Finding]
    remains: Examination

    @property
    def stops(self) -> bool:
        """Whether a run would still be spoilt: by the copy, or by a source of which no more could be read."""
        return self.remains.stops or any(finding.kind == "unreadable" for finding in self.left_out)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {"mended": self.mended, "left_out": self.left_out, "remains": self.remains.findings}
        return {
            "path": str(self.path),
            "read": self.read,
            "written": self.written,
            **{name: [finding.to_dict() for finding in findings] for name, findings in told.items()},
            "stops": self.stops,
        }

    def lines(self, colour: bool = False) -> list[str]:
        """The report for a person."""
        lines = [f"repaired   {self.path}: {self.written:,} of {self.read:,} rows"]
        for word, findings in (
            ("mended", self.mended),
            ("left out", self.left_out),
            ("remains", self.remains.findings),
        ):
            for finding in findings:
                lines.append(f"{word:<10} {finding.count:,} {finding.what}")
                lines += [f"           {spot}" for spot in finding.first]
                lines += [f"           and {more:,} more"] if (more := finding.count - len(finding.first)) else []
        if not self.mended and not self.left_out:
            lines.append("nothing was mended")
        return [*lines, f"{self.path}: {self.remains.verdict(colour)}"]


def repair(
    settings: DataSettings,
    task: TaskSettings,
    out: str | Path,
    tokenizer: Any = None,
    *,
    family: Family | None = None,
    train: TrainSettings | None = None,
    overwrite: bool = False,
    shown: int = 3,
    progress: Progress | None = None,
) -> Repaired:
    """Write what ``settings.path`` names to ``out``, mended, and examine the copy.

    Args:
        settings: the data.
        task: what is to be learned; ``auto`` is decided by ``family`` and the columns.
        out: a new ``.jsonl`` file.
        tokenizer, family, train: as for :func:`lorakeet.data.doctor.examine.examine`, of the copy.
        overwrite: replace ``out`` if it exists.
        shown: places of each kind that are kept; all are counted.
        progress: told the rows written so far.

    Raises:
        DataError: there is no such data, its columns make no rows for the task, its sources cannot stand in one file, or
            nothing would be left.
        OutputError: ``out`` is no ``.jsonl`` file, is a part of the data, or exists.
    """
    out = Path(out)
    check_out(settings, out, overwrite=overwrite)
    sources = find_sources(settings)
    name, menders = _menders(sources, settings, task, family)
    _survey(sources, menders, settings, task)
    copy = _Copy(_other_inputs(sources, settings, name, out), shown)
    with write_file(out) as aside:
        with aside.open("wb") as file:
            for source, row in _rows(sources, settings.limit):
                if line := copy.line(row, menders[source.name]):
                    file.write(line)
                if progress and copy.read % 1000 == 0:
                    progress(copy.read)
        if not copy.written:
            raise DataError(f"nothing is left of {copy.read:,} rows", "`lorakeet doctor` without --fix tells why")
    again = settings.model_copy(update={"path": str(out), "format": "jsonl", "weights": None})
    remains = examine(
        again, task.model_copy(update={"type": name}), tokenizer, family=family, train=train, shown=shown, samples=0
    )
    return Repaired(out, copy.read, copy.written, list(copy.mended), list(copy.left_out), remains)


def check_out(settings: DataSettings, out: Path, *, overwrite: bool = False) -> None:
    """Refuse an ``out`` that is no new ``.jsonl`` file, or that would become a part of the data; reads nothing.

    Raises:
        OutputError: as said.
        DataError: there is no such data.
    """
    if out.suffix.lower() != ".jsonl":
        raise OutputError(f"{out}: the copy is written as JSON lines", f"call it {out.with_suffix('.jsonl')}")
    if out.is_dir():
        raise OutputError(f"{out} is a folder, expected a file", "choose another name for the copy")
    for name in settings.path if isinstance(settings.path, list) else [settings.path]:
        for path in locate(name) or ():
            if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
                raise OutputError(
                    f"{out} lies in {path}, whose files are the data", "write the copy beside that folder"
                )
            if out.exists() and out.samefile(path):
                raise OutputError(f"{out} is the data itself", "choose another name for the copy")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists", "choose another name for the copy, or --overwrite to replace it")


class _Copy:
    """Decides of each record whether it is written, and counts what was done."""

    def __init__(self, measured: Repeats, shown: int) -> None:
        self.mended, self.left_out = Findings(shown), Findings(shown)
        self.read = self.written = 0
        self._measured = measured
        self._test = measured.seen()
        self._written: set[int] = set()  # hashes

    def line(self, row: Record, mender: Mender) -> bytes | None:
        """What is written of ``row``: a line of JSON, or nothing."""
        source, number = row.location.source, row.location.number
        self.read += number > 0
        if row.fault is not None:
            self.left_out.add(row.fault.code, source, number, row.fault.message)
            return None
        made = mender(row)
        if reason := self._reason(made, mender.layout):
            self.left_out.add(reason[0], source, number, reason[1])
            return None
        for kind, words in made.told.items():
            self.mended.add(kind, source, number, words)
        self.written += 1
        return _line(made.values)

    def _reason(self, made: Mended, layout: Layout) -> tuple[str, str] | None:
        """Why the record is left out, kind and words; None if it is not: what is not certain stays."""
        if made.canonical is None or made.problems.keys() >= {"misspelt_column", "null"}:
            return None
        if kind := next((kind for kind in _NOTHING if kind in made.problems), None):
            return kind, made.problems[kind]
        if (first := self._test.find(made.canonical, layout.kind)) is not None:
            return "both_sides", "as {}:{}".format(*self._measured.place(first))
        same = exact_hash(made.canonical, layout.kind)
        if same in self._written:
            return "duplicate", "is in the copy already"
        self._written.add(same)
        return None


def _menders(
    sources: Sequence[DataSource], settings: DataSettings, task: TaskSettings, family: Family | None
) -> tuple[TaskName, dict[str, Mender]]:
    """What is learned, and what mends each source by its name."""
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
        source.name: Mender(layouts.get(source.name, first[1]), () if source.format == "csv" else None, cut)
        for source in sources
    }


def _check_alike(*named: tuple[str, Layout]) -> None:
    """Two sources whose rows can stand in one file: each part of a row is in the same column of both."""
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
    sources: Sequence[DataSource], menders: Mapping[str, Mender], settings: DataSettings, task: TaskSettings
) -> None:
    """The first pass: what only all rows together can tell is given to the ``menders``."""
    labels = Labels(task.labels)
    numbers = {source.name: TypeInference(numbers=True) for source in sources if source.format == "csv"}
    for source, row in _rows(sources, settings.limit):
        if row.values is None:
            continue
        mender, label = menders[source.name], find_kind(menders[source.name].layout.kind).labels
        if source.name in numbers:
            numbers[source.name].add(row.values)
        beside = mender.may_be_misspelt(row.values)
        made = mender(row) if label or beside else None
        if made and made.canonical and not made.problems.keys() & set(_NOTHING):
            mender.beside |= beside
            if label:
                labels.add(source.name, row.location.number, made.canonical[label])
    for name, mender in menders.items():
        mender.labels, mender.names = labels.certain(), labels.counts
        if name in numbers:
            mender.numbers = [
                column for column, types in numbers[name].types().items() if types <= {INT, FLOAT} and types
            ]


def _other_inputs(sources: list[DataSource], settings: DataSettings, task: TaskName, out: Path) -> Repeats:
    """Rows of test and validation files beside the data; an earlier copy is none of them."""
    measured = Repeats()
    for source, place, values, kind in other_rows(sources, settings, task):
        if Path(source).resolve() != out.resolve():
            measured.add(source, place, values, kind)
    return measured


def _rows(sources: Sequence[DataSource], limit: int | None) -> Iterator[tuple[DataSource, Record]]:
    return islice(((source, row) for source in sources for row in source.rows()), limit)


def _line(values: Values) -> bytes:
    """One line of JSON in UTF-8; of what it cannot hold, no number (NaN) becomes null, and half a character an escape."""
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
