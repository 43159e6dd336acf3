"""Examination of data before training: one pass, in constant memory, every issue with its location.

Of each row only hashes, its location and its length are kept, about forty bytes; no text. :func:`examine` reads the
data itself. :func:`examine_rows` takes rows that a run has read, :func:`examine_heads` the beginnings of a stream.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import chain, islice
from typing import Any

import datasets
import numpy as np

from lorakeet.config import DataSettings, TaskName, TaskSettings, TrainSettings
from lorakeet.data.doctor.checks import Problems, check_row, diagnose, is_sound
from lorakeet.data.doctor.diagnosis import Examination, steps_of
from lorakeet.data.doctor.duplicates import Inputs, Repeats, hash_inputs
from lorakeet.data.doctor.issues import Issues
from lorakeet.data.doctor.label_stats import LabelStats
from lorakeet.data.doctor.leakage import other_rows
from lorakeet.data.doctor.length_histogram import Lengths
from lorakeet.data.doctor.token_stats import TokenStats
from lorakeet.data.encode.cache import ContentHash
from lorakeet.data.read.column_types import ColumnTypes
from lorakeet.data.read.record import Location, Record
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import Family, choose_task, find_layout, merge_layouts
from lorakeet.data.rows.kinds import Kind, Layout, find_kind
from lorakeet.data.rows.load import Rows, iter_values
from lorakeet.data.rows.split import as_digests, normalized
from lorakeet.errors import DataError

#: Rows of a file from which its columns and their types are inferred.
_HEAD = 1000
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
    """Read all rows of ``settings.path`` once and collect their issues.

    Args:
        settings: of the data.
        task: to be trained; ``auto`` is decided by ``family`` and the columns.
        tokenizer: of the base model; without it lengths are in characters, and there are no issues of tokens.
        family: of the base model; without it the columns alone decide an ``auto`` task.
        train: batch size and epochs, for an estimate of the steps.
        shown: issues of each code that are kept; all are counted.
        samples: decoded samples to keep.
        progress: called with the number of rows read so far.

    Raises:
        DataError: there is no such data at all. Everything else is an issue in the result.
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
    _find_leakage(sources, settings, name, examiner)
    return examiner.examination(name, layouts, [source.name for source in sources], train or TrainSettings())


@dataclass(frozen=True)
class ExaminedRows:
    """Result of :func:`examine_rows`.

    Attributes:
        issues: of all rows, without those of tokens.
        usable: numbers of the usable rows.
        digests: SHA-256 of the normalized content of each usable row, for the split; uint8 [usable rows, 32].
        content_hash: hash of all usable rows in their order.
    """

    issues: Issues
    usable: list[int]
    digests: np.ndarray
    content_hash: str


def examine_rows(rows: Rows, task: TaskSettings, settings: DataSettings) -> ExaminedRows:
    """Examine canonical rows that a run has read. They are not tokenized, so there are no issues of tokens.

    Args:
        rows: canonical columns, their layout and locations.
        task: with a concrete ``type``.
        settings: of the data.
    """
    kind = find_kind(rows.layout.kind)
    examiner = Examiner(settings, task)
    examiner.begin(rows.layout, task.type)
    usable, digests, whole = [], bytearray(), ContentHash(rows.data.column_names)
    text_columns = [column.name for column in kind.columns if column.is_text and column.name in rows.data.features]
    all_text = kind.texts is None and all(rows.data.features[name] == datasets.Value("string") for name in text_columns)
    all_text &= set(rows.data.column_names) <= {kind.labels, *text_columns}
    of_all_texts = [
        name for name in kind.content_columns() if name in rows.data.features
    ] == text_columns  # the texts of a row are what the split goes by
    for number, values in enumerate(iter_values(rows.data)):
        texts: Sequence[str] = [values[name] for name in text_columns] if all_text else ()
        problems: Problems = {}
        if not (all_text and all(map(is_sound, texts)) and not kind.missing(values)):
            problems, texts = check_row(values, kind)
        inputs = examiner.take(partial(rows.locations.__getitem__, number), values, problems, texts)
        if inputs is not None:
            usable.append(number)
            whole.add(values)
            text = " ".join(filter(None, inputs.texts)) if of_all_texts else normalized(kind.content(values))
            digests += hashlib.sha256(text.encode()).digest()
    examiner.rows = len(rows)
    examiner.repeats.locations = rows.locations if len(usable) == len(rows) else rows.locations.select(usable)
    examiner.finish()
    return ExaminedRows(examiner.found, usable, as_digests(digests), whole.hexdigest())


def examine_heads(
    mapped: Sequence[tuple[DataSource, Layout]],
    task: TaskSettings,
    *,
    settings: DataSettings,
    most: int,
    shown: int = 3,
) -> Examination:
    """Examine the beginnings of sources that will be streamed: equally many rows of each source.

    A number written as a string is not an issue here: every row is read by the types that the beginnings show.

    Args:
        mapped: each source, and which of its columns plays which role.
        task: with a concrete ``type``.
        settings: of the data.
        most: rows of all sources together; at least twenty of each.
        shown: issues of each code that are kept; all are counted.
    """
    examiner = Examiner(settings, task, shown=shown)
    left = math.inf if settings.limit is None or settings.weights else settings.limit
    for source, layout in mapped:
        examiner.begin(layout, task.type, typed=False)
        count = int(min(max(most // len(mapped), 20), left - examiner.rows))
        for row in islice(source.rows(set(layout.columns.values())), count):
            examiner.read(row, layout)
    examiner.finish()
    return examiner.examination(task.type, {"": mapped[0][1]}, [], TrainSettings())


class Examiner:
    """Takes rows one by one and keeps counts, hashes and lengths.

    Args:
        settings: of the data.
        task: given labels and problem.
        tokenizer: of the base model, or None.
        shown: issues of each code that are kept.
        samples: decoded samples to keep; None: no statistics of the samples.

    Attributes:
        found: the issues so far.
        rows: records so far, the broken ones included.
        usable: rows that a sample can be made of.
    """

    def __init__(
        self,
        settings: DataSettings,
        task: TaskSettings,
        tokenizer: Any = None,
        *,
        shown: int = 3,
        samples: int | None = None,
    ) -> None:
        self.found = Issues(shown)
        self.rows = self.usable = 0
        self.repeats = Repeats()
        self.labels = LabelStats(task, shown=shown)
        self.kind: Kind | None = None
        self.typed = True
        self.stats = None if samples is None else TokenStats(settings, task, tokenizer, self.found, samples)

    def begin(self, layout: Layout, task: TaskName, *, typed: bool = True) -> None:
        """Set the ``layout`` of the rows that follow; ``typed``: their source tells numbers from strings."""
        self.typed = typed
        self.kind = find_kind(layout.kind)
        self.labels.begin(self.kind)
        if self.stats is not None:
            self.stats.begin(layout, task)

    def read(self, record: Record, layout: Layout | None) -> None:
        """Take a record as it was found, perhaps with a fault."""
        location = record.location
        self.rows += location.number > 0
        if record.fault is not None:
            self.found.add(record.fault.code, location, record.fault.message, record.fault.hint)
        elif layout is not None:
            values, problems, texts = diagnose(record, layout, typed=self.typed)
            if values is None:
                for code, message in problems.items():
                    self.found.add(code, location, message)
            elif self.take(lambda: location, values, problems, texts) is not None:
                self.repeats.locations.append(location)

    def take(
        self, locate: Callable[[], Location], values: Mapping[str, Any], problems: Problems, texts: Sequence[str]
    ) -> Inputs | None:
        """Take a canonical row; the location of a usable one is the caller's to add to ``repeats``.

        Args:
            locate: returns the location of the row, where it is needed.
            values: canonical columns.
            problems: of the row alone, by code.
            texts: all texts of a usable row.

        Returns:
            The hashes of a usable row, None for another one.
        """
        assert self.kind is not None
        inputs = None
        if not problems.keys() & {"null", "empty"}:
            self.usable += 1
            inputs = hash_inputs(values, self.kind, texts)
            self.repeats.add(inputs)
            column = self.kind.labels
            if column and (unknown := self.labels.add(locate(), values[column])):
                problems["label_unknown"] = unknown
        elif "misspelt_column" in problems:
            problems.pop("null", None)  # it follows from the misspelt name
        for code, message in problems.items():
            self.found.add(code, locate(), message)
        if self.stats is not None and inputs is not None and not problems.keys() & {"role", "answer_place"}:
            self.stats.add(locate(), values, texts)
        return inputs

    def finish(self) -> None:
        """Add the issues that only all rows together show."""
        if self.stats is not None:
            self.stats.finish()
        self.labels.find(self.found)
        locations = self.repeats.locations
        for repeat in self.repeats.found():
            self.found.add(repeat.code, locations[repeat.row], f"as {locations[repeat.first]}")

    def examination(
        self, task: TaskName, layouts: Mapping[str, Layout], sources: list[str], train: TrainSettings
    ) -> Examination:
        """Return the result.

        Args:
            task: that was examined for.
            layouts: of the sources, by name.
            sources: names of the sources.
            train: batch size and epochs, for an estimate of the steps.
        """
        layout = next(iter(layouts.values()), None)
        if self.rows and not self.usable and not any(group.severity == "stops" for group in self.found):
            self.found.add(
                "nothing", Location(sources[0] if sources else ""), f"none of {self.rows:,} rows can be used"
            )
        lengths = Lengths("characters") if self.stats is None else self.stats.lengths
        counted = self.stats if lengths.unit == "tokens" else None
        return Examination(
            sources=sources,
            task=task,
            kind=layout.kind if layout else None,
            columns=layout.columns if layout else {},
            rows=self.rows,
            usable=self.usable,
            issues=list(self.found),
            labels=dict(self.labels.counts),
            lengths=lengths,
            tokens=counted.tokens if counted else None,
            targets=counted.targets if counted else None,
            unknown=counted.unknown if counted else None,
            steps=steps_of(self.usable, train),
            samples=self.stats.samples if self.stats else (),
        )


def task_of(
    given: TaskName, family: Family | None, types: Mapping[str, ColumnTypes], settings: DataSettings
) -> TaskName:
    """Return the task: the ``given`` one, or the one for a base of ``family`` and columns of these ``types``.

    Args:
        given: the task of the settings.
        family: of the base model; None: unknown.
        types: columns of the source.
        settings: of the data.
    """
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
    types: Mapping[str, ColumnTypes], settings: DataSettings, task: TaskName, source: DataSource, found: Issues
) -> Layout | None:
    try:
        return find_layout(types, settings, task, source.name)
    except DataError as error:
        message = f"{error.message}; {error.hint}" if error.hint else error.message
        found.add("columns", Location(source.name), message, error.hint)
        return None


def _misspelt_optional(source: DataSource, types: Mapping[str, ColumnTypes], layout: Layout, found: Issues) -> None:
    """Find unused columns whose name is close to an optional role of such rows."""
    free = [name for name in types if name not in layout.columns.values() and "." not in name]
    for roles in find_kind(layout.kind).roles:
        for role, known in roles.optional.items():
            if role in layout.columns:
                continue
            for name in free:
                if name.lower() not in known.names and get_close_matches(name.lower(), known.names, 1, 0.8):
                    message = f"column {name!r} is not used; is {role!r} meant?"
                    found.add("misspelt_column", Location(source.name), message)


def _merge(layouts: Mapping[str, Layout], found: Issues) -> None:
    if len(layouts) < 2:
        return
    try:
        merge_layouts(layouts)
    except DataError as error:
        found.add("columns", Location(next(iter(layouts))), error.message, error.hint)


def _find_leakage(sources: list[DataSource], settings: DataSettings, task: TaskName, examiner: Examiner) -> None:
    """Find rows of a test or validation file that are trained on too, which makes their metrics meaningless."""
    index = examiner.repeats.index()
    for location, inputs in other_rows(sources, settings, task):
        if (first := index.find(inputs)) is not None:
            examiner.found.add("both_sides", location, f"as {first}, which is learned")
