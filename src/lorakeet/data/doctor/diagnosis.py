"""Result of an examination of data: issues, labels, lengths and samples, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakeet.config import TaskName, TrainSettings
from lorakeet.data.doctor.issues import IssueGroup
from lorakeet.data.doctor.length_histogram import Lengths

#: Characters of the longest bar of a histogram.
_BAR = 40
_RED, _YELLOW, _GREEN, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True)
class Shown:
    """Decoded sample with its location, as plain text and in color."""

    place: str
    plain: str
    coloured: str


@dataclass(frozen=True)
class Examination:
    """The result of :func:`lorakeet.data.doctor.examine.examine`.

    Attributes:
        sources: what was read.
        task: that was examined for.
        kind: of the rows; None where no columns were recognized.
        columns: role -> column of the source.
        rows: records read; a sample can be made of ``usable`` of them.
        issues: by code; those that stop a run come first.
        labels: rows by label; empty where there are none.
        lengths: of the samples, before they are cut.
        tokens, targets: of the samples that a run would make; None without a tokenizer.
        unknown: unknown tokens in the samples; None without a tokenizer.
        steps: optimizer steps with the given settings.
        samples: the first few, decoded.
    """

    sources: Sequence[str]
    task: TaskName
    kind: str | None
    columns: Mapping[str, str]
    rows: int
    usable: int
    issues: Sequence[IssueGroup]
    labels: Mapping[Any, int]
    lengths: Lengths
    tokens: int | None
    targets: int | None
    unknown: int | None
    steps: int
    samples: Sequence[Shown] = field(default_factory=tuple)

    @property
    def stops(self) -> bool:
        """Whether something was found that would spoil a run."""
        return any(group.severity == "stops" for group in self.issues)

    def count(self, code: str) -> int:
        """Return the number of rows that have an issue of this code."""
        return next((group.count for group in self.issues if group.code == code), 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "sources": list(self.sources),
            "task": self.task,
            "kind": self.kind,
            "columns": dict(self.columns),
            "rows": self.rows,
            "usable": self.usable,
            "healthy": not self.issues,
            "stops": self.stops,
            "findings": [group.to_dict() for group in self.issues],
            "labels": {str(label): count for label, count in self.labels.items()},
            "lengths": self.lengths.figures(),
            "tokens": self.tokens,
            "targets": self.targets,
            "unknown_tokens": self.unknown,
            "steps": self.steps,
            "samples": [{"place": sample.place, "text": sample.plain} for sample in self.samples],
        }

    def lines(self, colour: bool = False) -> list[str]:
        """Return the lines of the report."""
        parts = ", ".join(f"{role} in {column!r}" for role, column in self.columns.items())
        lines = [
            f"data       {', '.join(self.sources)}",
            f"rows       {self.rows:,}, of which {self.usable:,} can be used",
        ]
        lines.append(
            f"task       {self.task}, rows of kind {self.kind} ({parts})" if self.kind else f"task       {self.task}"
        )
        lines += self._amounts()
        if self.labels:
            most = sorted(self.labels.items(), key=lambda item: -item[1])
            more = f" and {len(most) - 8} more" if len(most) > 8 else ""
            lines.append(f"labels     {', '.join(f'{label} {count:,}' for label, count in most[:8])}{more}")
        lines += self._histogram()
        for sample in self.samples:
            lines += [f"sample     {sample.place}", sample.coloured if colour else sample.plain]
        lines += [line for group in self.issues for line in _group_lines(group, self.rows, colour)]
        return [*lines, self.verdict(colour)]

    def _amounts(self) -> list[str]:
        if self.tokens is None:
            return ["tokens     not counted: give --model to see lengths, truncation and unknown words"]
        share = f", {self.unknown:,} of them unknown to the base" if self.unknown else ""
        return [f"tokens     {self.tokens:,}{share}; {self.targets:,} learned; {self.steps:,} steps at these settings"]

    def _histogram(self) -> list[str]:
        bars = self.lengths.bars()
        most = max((bar.count for bar in bars), default=0)
        rows = [
            f"  {bar.first:>6,} to {bar.last:>6,}  {'█' * math.ceil(_BAR * bar.count / most)} {bar.count:,}"
            for bar in bars
            if bar.count
        ]
        return [f"length     in {self.lengths.unit}", *rows] if rows else []

    def verdict(self, colour: bool = False) -> str:
        """Return one line that says whether a run would stop."""
        if not self.issues:
            words, paint = "healthy: nothing was found", _GREEN
        elif self.stops:
            words, paint = "a run would stop: mend what is marked 'stops'", _RED
        else:
            words, paint = "a run would warn and go on", _YELLOW
        return f"{paint}{words}{_PLAIN}" if colour else words


def _group_lines(group: IssueGroup, rows: int, colour: bool) -> list[str]:
    paint = (_RED if group.severity == "stops" else _YELLOW) if colour else ""
    share = f" ({100 * group.count / rows:.1f} %)" if rows else ""
    head = f"{paint}{group.severity:<10}{_PLAIN if colour else ''} {group.count:,} {group.description}{share}"
    left = group.count - len(group.first)
    return [
        head,
        *(f"           {issue}" for issue in group.first),
        *([f"           and {left:,} more"] if left > 0 else []),
    ]


def steps_of(samples: int, train: TrainSettings) -> int:
    """Return the number of optimizer steps for this many samples."""
    train = train.for_rows(samples)
    return train.steps or math.ceil(samples * (train.epochs or 1) / (train.batch_size * train.grad_accum))
