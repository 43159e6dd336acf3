"""Examination of rows one by one: counts, hashes and lengths of all of them, and the issues of each.

:func:`examine_rows` examines the rows that a run has read; :mod:`lorakeet.data.doctor.examine` reads the data itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np

from lorakeet.config import DataSettings, TaskName, TaskSettings, TrainSettings
from lorakeet.data.doctor.checks import Problems, check_row, diagnose, is_sound
from lorakeet.data.doctor.diagnosis import Examination, steps_of
from lorakeet.data.doctor.duplicates import Inputs, Repeats, hash_inputs
from lorakeet.data.doctor.issues import Issues
from lorakeet.data.doctor.label_stats import LabelStats
from lorakeet.data.doctor.length_histogram import Lengths
from lorakeet.data.doctor.token_stats import TokenStats
from lorakeet.data.read.record import Location, Record
from lorakeet.data.rows.kinds import Kind, Layout, find_kind
from lorakeet.data.rows.load import Rows, iter_values
from lorakeet.data.rows.split import normalized
from lorakeet.facts.limits import Limits


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


def examine_rows(rows: Rows, task: TaskSettings, settings: DataSettings, tokenizer: Any = None) -> ExaminedRows:
    """Examine canonical rows that a run has read. They are not tokenized, so there are no issues of tokens.

    Args:
        rows: canonical columns, their layout and locations.
        task: with a concrete ``type``.
        settings: of the data.
        tokenizer: whose chat template renders conversations.
    """
    kind = find_kind(rows.layout.kind)
    examiner = Examiner(settings, task, tokenizer)
    examiner.begin(rows.layout, task.type)
    usable, digests, whole = [], bytearray(), ContentHash(rows.data.column_names)
    text_columns = [column.name for column in kind.columns if column.is_text and column.name in rows.data.features]
    is_plain = _is_plain(rows, kind, text_columns)
    content_columns = [name for name in kind.content_columns() if name in rows.data.features]
    splits_by_texts = content_columns == text_columns
    for number, values in enumerate(iter_values(rows.data)):
        problems: Problems = {}
        texts: Sequence[str] = [values[name] for name in text_columns] if is_plain else ()
        if not (is_plain and all(map(is_sound, texts)) and (kind.labels is None or not kind.missing(values))):
            problems, texts = check_row(values, kind, examiner.template)
        inputs = examiner.take(partial(rows.locations.__getitem__, number), values, problems, texts)
        if inputs is not None:
            usable.append(number)
            whole.add(values)
            text = " ".join(filter(None, inputs.texts)) if splits_by_texts else normalized(kind.content(values))
            digests += hashlib.sha256(text.encode()).digest()
    examiner.rows = len(rows.data)
    examiner.repeats.locations = rows.locations if len(usable) == examiner.rows else rows.locations.select(usable)
    examiner.finish()
    of_rows = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)
    return ExaminedRows(examiner.found, usable, of_rows, whole.hexdigest())


def _is_plain(rows: Rows, kind: Kind, text_columns: Sequence[str]) -> bool:
    """Whether rows are texts in ``text_columns``, perhaps with a label, so that sound texts make a sound row."""
    strings = all(rows.data.features[name] == datasets.Value("string") for name in text_columns)
    return kind.texts is None and strings and set(rows.data.column_names) <= {kind.labels, *text_columns}


class ContentHash:
    """SHA-256 of rows in their order, labels included; of the texts themselves, where there is nothing else.

    Args:
        columns: of the rows.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._only_text = list(columns) == ["text"]
        self._digest = hashlib.sha256()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        text = row["text"] if self._only_text else json.dumps(row, sort_keys=True, ensure_ascii=False)
        data = text.encode()
        self._digest.update(b"%d:" % len(data) + data)

    def hexdigest(self) -> str:
        """Return the hash of the rows so far, in hexadecimal."""
        return self._digest.hexdigest()


def content_hash(texts: Iterable[str]) -> str:
    """Return the :class:`ContentHash` of rows of text alone."""
    digest = ContentHash(["text"])
    for text in texts:
        digest.add({"text": text})
    return digest.hexdigest()


class Examiner:
    """Takes rows one by one and keeps counts, hashes and lengths.

    Args:
        settings: of the data.
        task: given labels and problem.
        tokenizer: of the base model, or None.
        limits: of the base model, or None.
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
        limits: Limits | None = None,
        shown: int = 3,
        samples: int | None = None,
    ) -> None:
        self.found = Issues(shown)
        self.rows = self.usable = 0
        self.repeats = Repeats()
        self.labels = LabelStats(task, shown=shown)
        self.template = getattr(tokenizer, "chat_template", None)
        self.kind: Kind | None = None
        self.typed = True
        self.stats = None if samples is None else TokenStats(settings, task, tokenizer, self.found, samples, limits)

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
            values, problems, texts = diagnose(record, layout, typed=self.typed, template=self.template)
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
