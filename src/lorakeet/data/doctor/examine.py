"""Examination of data before training: one pass, in constant memory, every issue with its location.

Of each row only hashes, its location and its length are kept, about forty bytes; no text. :func:`examine` reads the
data itself, :func:`examine_heads` the beginnings of a stream; :mod:`lorakeet.data.doctor.examiner` takes the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

from lorakeet.config import DataSettings, TaskName, TaskSettings, TrainSettings
from lorakeet.data.doctor.diagnosis import Examination
from lorakeet.data.doctor.examiner import Examiner
from lorakeet.data.doctor.issues import Issues
from lorakeet.data.doctor.leakage import other_rows
from lorakeet.data.read.column_types import ColumnTypes
from lorakeet.data.read.record import Location
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import (
    TELLING_NAMES,
    Family,
    choose_task,
    find_layout,
    merge_layouts,
    unused_columns,
    with_columns_of,
)
from lorakeet.data.rows.kinds import Layout, find_kind
from lorakeet.errors import DataError
from lorakeet.facts.limits import Limits

#: Rows of a file from which its columns and their types are inferred.
_HEAD = 1000
Progress = Callable[[int], None]


def examine(
    settings: DataSettings,
    task: TaskSettings | None = None,
    tokenizer: Any = None,
    *,
    limits: Limits | None = None,
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
        limits: of the base model; without them every token and length is fine.
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
    examiner = Examiner(settings, task, tokenizer, limits=limits, shown=shown, samples=samples)
    name, layouts = _layouts(sources, settings, task.type, family, examiner.found)
    left = settings.limit
    for source in sources:
        layout = layouts.get(source.name)
        if layout is not None:
            examiner.begin(layout, name, typed=source.format != "csv")
        before = examiner.rows
        for row in islice(source.rows(), left):
            examiner.read(row, layout)
            if progress and examiner.rows % 1000 == 0:
                progress(examiner.rows)
        left = None if left is None else left - (examiner.rows - before)
    examiner.finish()
    _find_leakage(sources, settings, name, examiner)
    return examiner.examination(name, layouts, [source.name for source in sources], train or TrainSettings())


def examine_heads(
    mapped: Sequence[tuple[DataSource, Layout]],
    task: TaskSettings,
    *,
    settings: DataSettings,
    most: int,
    tokenizer: Any = None,
    shown: int = 3,
) -> Examination:
    """Examine the beginnings of sources that will be streamed: equally many rows of each source.

    A number written as a string is not an issue here: every row is read by the types that the beginnings show.

    Args:
        mapped: each source, and which of its columns plays which role.
        task: with a concrete ``type``.
        settings: of the data.
        most: rows of all sources together; at least twenty of each.
        tokenizer: whose chat template renders conversations.
        shown: issues of each code that are kept; all are counted.
    """
    examiner = Examiner(settings, task, tokenizer, shown=shown)
    left = math.inf if settings.limit is None or settings.weights else settings.limit
    for source, layout in mapped:
        examiner.begin(layout, task.type, typed=False)
        count = int(min(max(most // len(mapped), 20), left - examiner.rows))
        for row in islice(source.rows(set(layout.columns.values())), count):
            examiner.read(row, layout)
    examiner.finish()
    return examiner.examination(task.type, {"": mapped[0][1]}, [], TrainSettings())


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


def _layouts(
    sources: Sequence[DataSource], settings: DataSettings, task: TaskName, family: Family | None, found: Issues
) -> tuple[TaskName, dict[str, Layout]]:
    """Return the task, and the layout of each source by the beginning of its rows, as far as ``settings.limit`` goes."""
    layouts: dict[str, Layout] = {}
    left = settings.limit
    for source in sources:
        rows = islice(source.rows(), left)
        head = list(islice(rows, _HEAD))
        types = source.usual_types(head)
        task = task_of(task, family, types, settings) if types else task
        layout = _layout(types, settings, task, source, found) if types else None
        if layout is not None:
            layouts[source.name] = layout
            _misspelt_optional(source, types, layout, found)
            for name in unused_columns(types, layout, TELLING_NAMES):
                found.add("unused_column", Location(source.name), f"column {name!r} is not used")
        left = None if left is None else left - len(head) - sum(1 for _ in rows)
    return task, _merge(layouts, found)


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


def _merge(layouts: dict[str, Layout], found: Issues) -> dict[str, Layout]:
    """Return the layouts with the optional columns of all of them, as a run reads them."""
    if len(layouts) < 2:
        return layouts
    try:
        return with_columns_of(merge_layouts(layouts), layouts)
    except DataError as error:
        found.add("columns", Location(next(iter(layouts))), error.message, error.hint)
        return layouts


def _find_leakage(sources: list[DataSource], settings: DataSettings, task: TaskName, examiner: Examiner) -> None:
    """Find rows of a test or validation file that are trained on too, which makes their metrics meaningless."""
    index = examiner.repeats.index()
    for location, inputs in other_rows(sources, settings, task):
        if (first := index.find(inputs)) is not None:
            examiner.found.add("both_sides", location, f"as {first}, which is learned")
