"""The names of classes or tags, and the number that each has for the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakeet.config import TaskSettings
from lorakeet.data.read.column_types import FLOAT, ColumnType
from lorakeet.data.read.record import Location
from lorakeet.errors import DataError, did_you_mean

Problem = Literal["single_label", "multi_label", "regression"]

_SHOWN = 3  # wrong labels that an error spells out; it counts the rest
_MOST = 1000  # different names of classes; a column with more usually holds numbers or texts


@dataclass(frozen=True)
class LabelSet:
    """Labels of a data set and their numbers.

    Attributes:
        names: of the classes or tags, in the order of their numbers; none for a regression.
        problem: kind of a SEQ_CLS; None for tags.
    """

    names: tuple[str, ...] = ()
    problem: Problem | None = None
    _places: Mapping[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_places", {name: number for number, name in enumerate(self.names)})

    def number(self, label: Any) -> int:
        """Return the number of a label: that of its name; a whole number that is no name counts the names from 0.

        Raises:
            ValueError: there is no such label; the message has the expected ones.
        """
        name = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
        if name in self._places:
            return self._places[name]
        if not isinstance(label, str) and not any(map(_is_number, self.names)):
            if 0 <= label < len(self.names) and label == int(label):
                return int(label)
            raise ValueError(f"label {label}, expected a name or a number below {len(self.names)}")
        hint = did_you_mean(name, self.names) or f"known are {', '.join(self.names[:10])}"
        raise ValueError(f"label {name!r} is none of the {len(self.names)} labels; {hint}")

    def target(self, label: Any) -> Any:
        """Return a label as the model takes it: int; for multi_label a list of 0.0 and 1.0 [names]; for regression float.

        Raises:
            ValueError: there is no such label.
        """
        if self.problem == "regression":
            value = float(label)
            if not math.isfinite(value):
                raise ValueError(f"label {value}, expected a finite number")
            return value
        if self.problem == "multi_label":
            marked = {self.number(one) for one in (label if isinstance(label, list) else [label])}
            return [float(number in marked) for number in range(len(self.names))]
        return self.number(label)

    def classes(self, label: Any) -> list[str]:
        """Return the names in a row's label or tags."""
        if self.problem == "regression":
            return []
        return [self.names[self.number(one)] for one in (label if isinstance(label, list) else [label])]

    def count(self, labels: Iterable[Any]) -> dict[str, int]:
        """Count each name in ``labels``, with 0 for a name that does not occur."""
        counts = Counter(name for label in labels for name in self.classes(label))
        return {name: counts[name] for name in self.names}


def find_labels(labels: Sequence[Any], locations: Sequence[Location], task: TaskSettings, source: str) -> LabelSet:
    """Return the label set of ``labels``, one value a row: as ``task`` says, or as found.

    Names that are found are sorted; whole numbers become their digits, in the order of the numbers.

    Args:
        labels: A label, a list of labels or a list of tags of each row.
        locations: Of the rows.
        task: What is trained.
        source: What was read, for messages.

    Raises:
        DataError: labels that are not among the given names (with the first locations, and their number), or that do not
            fit the problem. Or names are given twice, all rows have one label, or there are more than 1,000 labels.
    """
    problem = None if task.type == "TOKEN_CLS" else _problem(labels, task, source)
    if problem == "regression":
        found = LabelSet((), problem)
    else:
        found = LabelSet(tuple(task.labels) if task.labels else _names(labels), problem)
    _check_names(found, task.labels, source)
    _check_rows(found, labels, locations, source)
    return found


def given_labels(type: ColumnType, task: TaskSettings) -> LabelSet:
    """Return the labels of a stream, which cannot be gathered before it is read: ``task`` must name them.

    Args:
        type: Type of the column of labels or tags.
        task: What is trained.

    Raises:
        DataError: neither names nor a regression.
    """
    problem: Problem | None = None
    if task.type != "TOKEN_CLS":
        fraction = type == FLOAT and not task.labels
        found: Problem = "multi_label" if type.is_list else "regression" if fraction else "single_label"
        problem = found if task.problem == "auto" else task.problem
    if problem != "regression" and not task.labels:
        raise DataError(
            "the labels of a stream cannot be gathered before it is learned", "give their names: task.labels=[one,two]"
        )
    labels = LabelSet(() if problem == "regression" else tuple(task.labels or ()), problem)
    _check_names(labels, task.labels, "the stream")
    return labels


def _problem(labels: Sequence[Any], task: TaskSettings, source: str) -> Problem:
    several = any(isinstance(label, list) for label in labels)
    words = any(isinstance(label, str) for label in labels)
    fractions = any(isinstance(label, float) and not label.is_integer() for label in labels)
    found: Problem = "multi_label" if several else "regression" if fractions else "single_label"
    wanted = found if task.problem == "auto" else task.problem
    if (several and wanted != "multi_label") or (words and wanted == "regression"):
        kind = "lists of labels" if several else "words"
        raise DataError(f"task.problem={wanted}, but the labels of {source} are {kind}", "leave task.problem out")
    if wanted != "regression" and fractions:
        number = next(label for label in labels if isinstance(label, float) and not label.is_integer())
        raise DataError(f"task.problem={wanted}, but {source} has the label {number}", "use task.problem=regression")
    return wanted


def _names(labels: Sequence[Any]) -> tuple[str, ...]:
    flat = {one for label in labels for one in (label if isinstance(label, list) else [label])}
    names = {str(int(one)) if isinstance(one, float) else str(one) for one in flat}
    return tuple(sorted(names, key=int if all(map(_is_number, names)) else None))


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name == str(int(name))


def _check_names(labels: LabelSet, given: Sequence[str] | None, source: str) -> None:
    if labels.problem == "regression":
        if given:
            raise DataError(f"task.labels names {len(given)} labels, but {source} is a regression", "leave it out")
        return
    if len(set(labels.names)) < len(labels.names):
        twice = [name for name, count in Counter(labels.names).items() if count > 1]
        raise DataError(f"task.labels has {', '.join(map(repr, twice))} more than once", "list each label once")
    if len(labels.names) < (1 if labels.problem == "multi_label" else 2):
        only = f"only the label {labels.names[0]!r}" if labels.names else "no label"
        raise DataError(f"{source} has {only}: there is nothing to tell apart", "give rows of at least two classes")
    if given is None and len(labels.names) > _MOST:
        raise DataError(
            f"{source} has {len(labels.names):,} different labels, such as {labels.names[0]!r}",
            "name the column of labels: data.columns.label=NAME; for numbers use task.problem=regression",
        )


def _check_rows(found: LabelSet, labels: Sequence[Any], locations: Sequence[Location], source: str) -> None:
    wrong = []
    for label, location in zip(labels, locations, strict=True):
        try:
            found.target(label) if found.problem else [found.number(one) for one in label]
        except ValueError as error:
            wrong.append(f"{location}: {error}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN:,} more" if len(wrong) > _SHOWN else ""
        raise DataError(
            f"{source} has labels that are not expected: {'; '.join(wrong[:_SHOWN])}{more}",
            "correct them, or give all names: task.labels=[one,two]",
        )
