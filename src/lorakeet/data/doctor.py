"""What is wrong with data before anything is learned from it: one pass, in constant memory, every problem with its place.

Of each row only hashes, its place and its length are kept, some forty bytes; no text. :func:`examine` reads the data
itself; :func:`check_rows` takes rows that a run has read already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any

import datasets

from lorakeet.config import DataSettings, TaskName, TaskSettings, TrainSettings
from lorakeet.data.canonical import RowError, canonical
from lorakeet.data.checks import check_row
from lorakeet.data.columns import TypeNames
from lorakeet.data.examination import Examination, steps_of
from lorakeet.data.findings import Findings
from lorakeet.data.labels import Labels
from lorakeet.data.layout import KINDS, Family, Kind, Layout, choose_task, find_layout, merge_layouts
from lorakeet.data.measure import Measure
from lorakeet.data.read import Row, Source, find_sources
from lorakeet.data.repeats import Repeats
from lorakeet.data.sides import other_side
from lorakeet.errors import DataError

_HEAD = 1000  # rows that tell the columns of a file and their types
_SHARE = 0.2  # of the values of a column that must be of a type for it to be one that the column holds
_FAULTS = {"half a character": "half_character", "expected one for each": "tag_count", "answer": "answer_place"}
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
        types = types_of(source, head)
        name = _task(name, family, types, settings) if types else name
        layout = _layout(types, settings, name, source, examiner.found) if types else None
        if layout is not None:
            layouts[source.name] = layout
            examiner.begin(layout, name)
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
    rows: datasets.Dataset,
    layout: Layout,
    task: TaskSettings,
    *,
    settings: DataSettings,
    train: TrainSettings | None = None,
    shown: int = 3,
) -> Examination:
    """The same for canonical ``rows`` that were read already; nothing is tokenised again, so nothing is told of tokens.

    Args:
        rows: canonical columns and ``place``.
        layout: theirs.
        task: with a concrete ``type``.
        settings: the data.
        train: batch size and epochs, for an estimate of the steps.
        shown: problems of each kind that are kept with their place.
    """
    examiner = Examiner(settings, task, None, shown=shown, samples=0)
    examiner.begin(layout, task.type)
    for batch in rows.iter(1000):
        for at in range(len(batch["place"])):
            values = {name: batch[name][at] for name in batch}
            source, _, place = values["place"].rpartition(":")
            examiner.rows += 1
            examiner.take(source, int(place), values)
    examiner.finish()
    return examiner.examination(task.type, {"": layout}, [], train or TrainSettings())


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
        self.kind: Kind = "text"
        self.measure = Measure(settings, task, tokenizer, self.found, samples)

    def begin(self, layout: Layout, task: TaskName) -> None:
        """What follows is of this ``layout``."""
        self.kind = layout.kind
        self.labels.of_tags(layout.kind == "tags")
        self.measure.begin(layout, task)

    def read(self, row: Row, layout: Layout | None) -> None:
        """Take a record as it was found, perhaps with a fault."""
        self.rows += row.place > 0
        if row.fault is not None:
            kind = "encoding" if "UTF-8" in row.fault else "broken"
            self.found.add(kind if row.place else "unreadable", row.source, row.place, row.fault)
        elif layout is not None:
            try:
                values = canonical(row, layout)
            except RowError as error:
                kind = next((kind for phrase, kind in _FAULTS.items() if phrase in error.fault), "wrong_type")
                self.found.add(kind, row.source, row.place, error.fault)
                return
            self.take(row.source, row.place, values, _misspelt(row, layout))

    def take(self, source: str, place: int, values: Mapping[str, Any], misspelt: str | None = None) -> None:
        """Take a canonical row; ``misspelt`` is a complaint about the names of its columns."""
        problems = check_row(values, self.kind)
        if misspelt:
            problems["misspelt_column"] = misspelt
        usable = not problems.keys() & {"null", "empty"}
        if usable:
            self.usable += 1
            self.repeats.add(source, place, values, self.kind)
            label = {"classes": "label", "tags": "tags"}.get(self.kind)
            if label and (unknown := self.labels.add(source, place, values[label])):
                problems["label_unknown"] = unknown
        elif misspelt:
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


def types_of(source: Source, head: list[Row]) -> dict[str, str]:
    """Columns and their types, by the schema or by what most of the first rows hold: a stray value makes no type."""
    known = source.schema()
    if known is not None:
        return known
    counts: dict[str, dict[str, int]] = {}
    for row in head:
        if row.values is None:
            continue
        one = TypeNames(numbers=source.format == "csv")
        one.add(row.values)
        for name, kind in one.names().items():
            held = counts.setdefault(name, {})
            held[kind] = held.get(kind, 0) + 1
    types = {}
    for name, held in counts.items():
        values = {kind: count for kind, count in held.items() if kind != "null"}
        kinds = {kind for kind, count in values.items() if count >= _SHARE * sum(values.values())}
        if source.format == "csv" and len(kinds) > 1:
            kinds = {"float"} if kinds == {"int", "float"} else {"str"}
        if any(kind.startswith("list[") for kind in kinds):
            kinds -= {"list"}
        types[name] = " or ".join(sorted(kinds)) or "null"
    return types


def _task(given: TaskName, family: Family | None, types: Mapping[str, str], settings: DataSettings) -> TaskName:
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
    types: Mapping[str, str], settings: DataSettings, task: TaskName, source: Source, found: Findings
) -> Layout | None:
    try:
        return find_layout(types, settings, task, source.name)
    except DataError as error:
        found.add("columns", source.name, 0, f"{error.message}; {error.hint}" if error.hint else error.message)
        return None


def _misspelt_optional(source: Source, types: Mapping[str, str], layout: Layout, found: Findings) -> None:
    """Columns that nobody uses and whose name is close to a part that such rows may have."""
    free = [name for name in types if name not in layout.columns.values() and "." not in name]
    for roles in KINDS[layout.kind]:
        for role, names in roles.optional.items():
            if role in layout.columns:
                continue
            for name in free:
                if name.lower() not in names and get_close_matches(name.lower(), names, 1, 0.8):
                    found.add("misspelt_column", source.name, 0, f"column {name!r} is not used; is {role!r} meant?")


def _misspelt(row: Row, layout: Layout) -> str | None:
    """A complaint about a row that lacks a column and has one of a similar name."""
    values = row.values or {}
    for role, column in layout.columns.items():
        if column in values or "." in column:
            continue
        free = [name for name in values if name not in layout.columns.values()]
        if near := get_close_matches(column, free, 1, 0.7):
            return f"no {role}, but {near[0]!r}; is {column!r} meant?"
    return None


def _merge(layouts: Mapping[str, Layout], found: Findings) -> None:
    if len(layouts) < 2:
        return
    try:
        merge_layouts(layouts)
    except DataError as error:
        found.add("columns", next(iter(layouts)), 0, error.message)


def _compare_sides(sources: list[Source], settings: DataSettings, task: TaskName, examiner: Examiner) -> None:
    """Rows of a test or validation file that are learned too: what is measured on them is worth nothing."""
    seen = examiner.repeats.seen()
    for source in other_side(sources, settings):
        types = types_of(source, list(islice(source.rows(), _HEAD)))
        try:
            layout = find_layout(types, settings, task, source.name)
        except DataError:
            continue
        for row in source.rows():
            try:
                values = canonical(row, layout)
            except RowError:
                continue
            if check_row(values, layout.kind).keys() & {"null", "empty"}:
                continue
            if (first := seen.find(values, layout.kind)) is not None:
                where, place = examiner.repeats.place(first)
                examiner.found.add("both_sides", source.name, row.place, f"as {where}:{place}, which is learned")
