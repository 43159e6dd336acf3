"""What is wrong with data before anything is learned from it: one pass, in constant memory, every problem with its place.

Of each row only hashes, its place and its length are kept, some forty bytes; no text. :func:`examine` reads the data
itself; :func:`check_rows` takes rows that a run has read already, :func:`check_heads` the beginnings of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any

from lorakeet.config import DataSettings, TaskName, TaskSettings, TrainSettings
from lorakeet.data.doctor.checks import Problems, check_row, diagnose
from lorakeet.data.doctor.diagnosis import Examination, steps_of
from lorakeet.data.doctor.duplicates import Repeats
from lorakeet.data.doctor.issues import Findings
from lorakeet.data.doctor.label_stats import Labels
from lorakeet.data.doctor.leakage import other_rows
from lorakeet.data.doctor.token_stats import Measure
from lorakeet.data.read.column_types import ColumnTypes
from lorakeet.data.read.record import Record
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import Family, choose_task, find_layout, merge_layouts
from lorakeet.data.rows.kinds import Layout, find_kind
from lorakeet.data.rows.load import Rows
from lorakeet.errors import DataError

_HEAD = 1000  # rows that tell the columns of a file and their types
Progress = Callable[[int], None]


def examine(
    settings: DataSettings,
    task: TaskSettings | None = None,
    tokenizer: Any = None,
    *,
    family: Family | None = None,
    train: TrainSettings | None = None,
    shown: int = 3,
    samples: int = 3,
    progress: Progress | None = None,
) -> Examination:
    """Read all rows of ``settings.path`` once and tell what is wrong with them.

    Args:
        settings: the data.
        task: what is to be learned; ``auto`` is decided by ``family`` and the columns.
        tokenizer: of the base model; without it nothing is told of tokens, and lengths are characters.
        family: of the base model; without it an ``auto`` task is told by the columns alone.
        train: batch size and epochs, for an estimate of the steps.
        shown: problems of each kind that are kept with their place; all are counted.
        samples: decoded samples to keep.
        progress: told the rows read so far.

    Raises:
        DataError: there is no such data at all. What is wrong inside of it is told in the result.
    """
    task = task or TaskSettings()
    sources = find_sources(settings)
    examiner = Examiner(settings, task, tokenizer, shown=shown, samples=samples)
    layouts: dict[str, Layout] = {}
    name: TaskName = task.type
    left = settings.limit
    for source in sources:
        rows = islice(source.rows(), left)
        head = list(islice(rows, _HEAD))
        types = source.usual_types(head)
        name = task_of(name, family, types, settings) if types else name
        layout = _layout(types, settings, name, source, examiner.found) if types else None
        if layout is not None:
            layouts[source.name] = layout
            examiner.begin(layout, name, typed=source.format != "csv")
            _misspelt_optional(source, types, layout, examiner.found)
        before = examiner.rows
        for row in chain(head, rows):
            examiner.read(row, layout)
            if progress and examiner.rows % 1000 == 0:
                progress(examiner.rows)
        left = None if left is None else left - (examiner.rows - before)
    _merge(layouts, examiner.found)
    examiner.finish()
    _compare_sides(sources, settings, name, examiner)
    return examiner.examination(name, layouts, [source.name for source in sources], train or TrainSettings())


def check_rows(
    rows: Rows,
    task: TaskSettings,
    *,
    settings: DataSettings,
    train: TrainSettings | None = None,
    shown: int = 3,
) -> Examination:
    """The same for canonical ``rows`` that were read already; nothing is tokenised again, so nothing is told of tokens.

    Args:
        rows: canonical columns, their layout and locations.
        task: with a concrete ``type``.
        settings: the data.
        train: batch size and epochs, for an estimate of the steps.
        shown: problems of each kind that are kept with their place.
    """
    examiner = Examiner(settings, task, None, shown=shown, samples=0)
    examiner.begin(rows.layout, task.type)
    locations = iter(rows.locations)
    for batch in rows.data.iter(1000):
        for columns in zip(*batch.values(), strict=True):
            values, location = dict(zip(batch, columns, strict=True)), next(locations)
            examiner.rows += 1
            examiner.take(location.source, location.number, values, check_row(values, rows.layout.kind))
    examiner.finish()
    return examiner.examination(task.type, {"": rows.layout}, [], train or TrainSettings())


def check_heads(
    laid: Sequence[tuple[DataSource, Layout]],
    task: TaskSettings,
    *,
    settings: DataSettings,
    most: int,
    shown: int = 3,
) -> Examination:
    """The same for the beginnings of sources that will be streamed: ``most`` rows at all, equally many of each.

    A number written as a string is no fault there, since every row is read by the types that the beginnings show.

    Args:
        laid: each source and which of its columns plays which part.
        task, settings, shown: as for :func:`check_rows`.
        most: rows to look at; of each of very many sources twenty.
    """
    examiner = Examiner(settings, task, None, shown=shown, samples=0)
    left = math.inf if settings.limit is None or settings.weights else settings.limit
    for source, layout in laid:
        examiner.begin(layout, task.type, typed=False)
        count = int(min(max(most // len(laid), 20), left - examiner.rows))
        for row in islice(source.rows(set(layout.columns.values())), count):
            examiner.read(row, layout)
    examiner.finish()
    return examiner.examination(task.type, {"": laid[0][1]}, [], TrainSettings())


class Examiner:
    """Takes rows one by one and keeps counts, hashes and lengths.

    Attributes:
        found: the problems so far.
        rows: records so far, the broken ones included.
        usable: rows that something can be learned from.
    """

    def __init__(
        self,
        settings: DataSettings,
        task: TaskSettings,
        tokenizer: Any,
        *,
        shown: int = 3,
        samples: int = 3,
    ) -> None:
        self.found = Findings(shown)
        self.rows = self.usable = 0
        self.repeats = Repeats()
        self.labels = Labels(task.labels, shown=shown)
        self.kind = "text"
        self.typed = True
        self.measure = Measure(settings, task, tokenizer, self.found, samples)

    def begin(self, layout: Layout, task: TaskName, *, typed: bool = True) -> None:
        """What follows is of this ``layout``; ``typed``: of a source that tells numbers from strings."""
        self.typed = typed
        self.kind = layout.kind
        self.labels.of_tags(layout.kind == "tags")
        self.measure.begin(layout, task)

    def read(self, row: Record, layout: Layout | None) -> None:
        """Take a record as it was found, perhaps with a fault."""
        source, number = row.location.source, row.location.number
        self.rows += number > 0
        if row.fault is not None:
            self.found.add(row.fault.code, source, number, row.fault.message)
        elif layout is not None:
            values, problems = diagnose(row, layout, typed=self.typed)
            if values is None:
                for kind, message in problems.items():
                    self.found.add(kind, source, number, message)
            else:
                self.take(source, number, values, problems)

    def take(self, source: str, place: int, values: Mapping[str, Any], problems: Problems) -> None:
        """Take a canonical row and what is wrong with it alone."""
        usable = not problems.keys() & {"null", "empty"}
        if usable:
            self.usable += 1
            self.repeats.add(source, place, values, self.kind)
            label = find_kind(self.kind).labels
            if label and (unknown := self.labels.add(source, place, values[label])):
                problems["label_unknown"] = unknown
        elif "misspelt_column" in problems:
            problems.pop("null", None)  # the one comes of the other
        for kind, message in problems.items():
            self.found.add(kind, source, place, message)
        if usable and not problems.keys() & {"role"}:
            self.measure.add(source, place, values)

    def finish(self) -> None:
        """Add what only all rows together can tell."""
        self.measure.finish()
        self.labels.find(self.found)
        for repeat in self.repeats.found():
            first, at = self.repeats.place(repeat.first)
            source, place = self.repeats.place(repeat.row)
            self.found.add(repeat.kind, source, place, f"as {first}:{at}")

    def examination(
        self, task: TaskName, layouts: Mapping[str, Layout], sources: list[str], train: TrainSettings
    ) -> Examination:
        """What was found."""
        layout = next(iter(layouts.values()), None)
        if self.rows and not self.usable and not any(finding.severity == "stops" for finding in self.found):
            self.found.add("nothing", sources[0] if sources else "", 0, f"none of {self.rows:,} rows can be used")
        counted = self.measure.lengths.unit == "tokens"
        return Examination(
            sources=sources,
            task=task,
            kind=layout.kind if layout else None,
            columns=layout.columns if layout else {},
            rows=self.rows,
            usable=self.usable,
            findings=list(self.found),
            labels=dict(self.labels.counts),
            lengths=self.measure.lengths,
            tokens=self.measure.tokens if counted else None,
            targets=self.measure.targets if counted else None,
            unknown=self.measure.unknown if counted else None,
            steps=steps_of(self.usable, train),
            samples=self.measure.samples,
        )


def task_of(
    given: TaskName, family: Family | None, types: Mapping[str, ColumnTypes], settings: DataSettings
) -> TaskName:
    """The task that is meant: the ``given`` one, or what a base of ``family`` learns from columns of these ``types``."""
    if given != "auto":
        return given
    if family is not None:
        return choose_task(family, types, settings.columns)
    for task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):  # no model is known: columns that can only mean one thing decide
        try:
            if find_layout(types, settings, task, "").kind in ("messages", "completion", "translation"):
                return "CAUSAL_LM" if task == "CAUSAL_LM" else "SEQ_2_SEQ_LM"
        except DataError:
            continue
    task = choose_task("encoder", types, settings.columns)
    return "CAUSAL_LM" if task == "MASKED_LM" else task


def _layout(
    types: Mapping[str, ColumnTypes], settings: DataSettings, task: TaskName, source: DataSource, found: Findings
) -> Layout | None:
    try:
        return find_layout(types, settings, task, source.name)
    except DataError as error:
        found.add("columns", source.name, 0, f"{error.message}; {error.hint}" if error.hint else error.message)
        return None


def _misspelt_optional(source: DataSource, types: Mapping[str, ColumnTypes], layout: Layout, found: Findings) -> None:
    """Columns that nobody uses and whose name is close to a part that such rows may have."""
    free = [name for name in types if name not in layout.columns.values() and "." not in name]
    for roles in find_kind(layout.kind).roles:
        for role, known in roles.optional.items():
            if role in layout.columns:
                continue
            for name in free:
                if name.lower() not in known.names and get_close_matches(name.lower(), known.names, 1, 0.8):
                    found.add("misspelt_column", source.name, 0, f"column {name!r} is not used; is {role!r} meant?")


def _merge(layouts: Mapping[str, Layout], found: Findings) -> None:
    if len(layouts) < 2:
        return
    try:
        merge_layouts(layouts)
    except DataError as error:
        found.add("columns", next(iter(layouts)), 0, error.message)


def _compare_sides(sources: list[DataSource], settings: DataSettings, task: TaskName, examiner: Examiner) -> None:
    """Rows of a test or validation file that are learned too: what is measured on them is worth nothing."""
    seen = examiner.repeats.seen()
    for source, place, values, kind in other_rows(sources, settings, task):
        if (first := seen.find(values, kind)) is not None:
            where, line = examiner.repeats.place(first)
            examiner.found.add("both_sides", source, place, f"as {where}:{line}, which is learned")
