"""The examiner: takes rows one by one and keeps counts, hashes and lengths, but no text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakeet.config import DataSettings, TaskName, TaskSettings, TrainSettings
from lorakeet.data.doctor.checks import Problems, diagnose
from lorakeet.data.doctor.diagnosis import Examination, steps_of
from lorakeet.data.doctor.duplicates import Inputs, Repeats, hash_inputs
from lorakeet.data.doctor.issues import Issues
from lorakeet.data.doctor.label_stats import LabelStats
from lorakeet.data.doctor.token_stats import TokenStats
from lorakeet.data.read.record import Location, Record
from lorakeet.data.rows.kinds import Kind, Layout, find_kind


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
        self.stats = TokenStats(settings, task, tokenizer, self.found, samples or 0)
        self._measured = samples is not None

    def begin(self, layout: Layout, task: TaskName, *, typed: bool = True) -> None:
        """Set the ``layout`` of the rows that follow; ``typed``: their source tells numbers from strings."""
        self.typed = typed
        self.kind = find_kind(layout.kind)
        self.labels.begin(self.kind)
        if self._measured:
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
        if self._measured and inputs is not None and not problems.keys() & {"role", "answer_place"}:
            self.stats.add(locate(), values, texts)
        return inputs

    def finish(self) -> None:
        """Add the issues that only all rows together show."""
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
        counted = self.stats.lengths.unit == "tokens"
        return Examination(
            sources=sources,
            task=task,
            kind=layout.kind if layout else None,
            columns=layout.columns if layout else {},
            rows=self.rows,
            usable=self.usable,
            issues=list(self.found),
            labels=dict(self.labels.counts),
            lengths=self.stats.lengths,
            tokens=self.stats.tokens if counted else None,
            targets=self.stats.targets if counted else None,
            unknown=self.stats.unknown if counted else None,
            steps=steps_of(self.usable, train),
            samples=self.stats.samples,
        )
