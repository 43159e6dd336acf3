"""Statistics of the labels of all rows: counts, and comparisons with the given labels and with each other."""

from __future__ import annotations

import re
from typing import Any

from lorakeet.config import TaskSettings
from lorakeet.data.doctor.issues import Issues
from lorakeet.data.read.record import Location
from lorakeet.data.rows.kinds import Kind
from lorakeet.errors import did_you_mean

#: Different labels. More of them are no classes.
_MOST = 1000
#: Different labels, from which on it is no accident that more than half of the rows have one of their own.
_OWN = 10
_NO_CLASSES = "for numbers set task.problem=regression, else name the column of labels: data.columns.label=NAME"
#: A label is rare where another is this many times more frequent.
_RARE = 10
_SEPARATORS = re.compile(r"[\s_-]+")


class LabelStats:
    """Counts of the rows of each label, with the first few locations of each.

    Args:
        task: names of the labels in their order, or None to find them; and the problem, where it is given.
        shown: locations of each label to keep.
    """

    def __init__(self, task: TaskSettings, *, shown: int = 3) -> None:
        self._given = task.labels
        self._is_regression = task.problem == "regression"
        self._tags = False  # tags of tokens, one of which is usually by far the most frequent
        self._shown = shown
        self._several = False  # rows with more than one label, or none
        self._too_many: Location | None = None  # the first row beyond the limit
        self._fractions = False  # labels of a regression
        self.counts: dict[Any, int] = {}
        self._locations: dict[Any, list[Location]] = {}

    def begin(self, kind: Kind) -> None:
        """Set the kind of the rows that follow."""
        self._tags = kind.name == "tags"

    def add(self, location: Location, label: Any) -> str | None:
        """Count the label or labels of one row; returns a message about one that is not among the given ones."""
        self._several |= isinstance(label, list) and not self._tags
        different = list(dict.fromkeys(label if isinstance(label, list) else [label]))
        self._fractions |= any(isinstance(one, float) and not one.is_integer() for one in different)
        for one in different if not self._too_many else ():
            self.counts[one] = self.counts.get(one, 0) + 1
            locations = self._locations.setdefault(one, [])
            if len(locations) < self._shown:
                locations.append(location)
        if len(self.counts) > _MOST:
            self._too_many = location
            self.counts.clear()
            self._locations.clear()
        return next(filter(None, map(self._unknown, different)), None)

    def find(self, found: Issues) -> None:
        """Add the issues that only all labels together show."""
        if self._is_regression or self._fractions:
            return
        if self._too_many is not None and self._given is None:
            found.add("many_labels", self._too_many, f"more than {_MOST:,} different labels up to here", _NO_CLASSES)
        if self._too_many is not None or len(self.counts) == 0:
            return
        if len(self.counts) == 1 and sum(self.counts.values()) > 1 and not self._several:
            [label] = self.counts
            found.add("one_label", self._locations[label][0], f"every row has the label {label!r}")
        if self._given is None:
            for label, usual in self.misspellings().items():
                self._find_misspelling(found, label, usual)
        if not self._tags:
            self._find_own(found)
            self._find_imbalance(found)

    def _find_own(self, found: Issues) -> None:
        """Find labels that hardly any two rows share: numbers of a regression, or names or texts of a wrong column."""
        rows, alone = sum(self.counts.values()), [label for label, count in self.counts.items() if count == 1]
        if self._given is None and not self._several and len(self.counts) >= _OWN and 2 * len(alone) > rows:
            message = f"{len(self.counts):,} different labels in {rows:,} rows, such as {alone[0]!r:.40}"
            found.add("own_label", self._locations[alone[0]][0], message, _NO_CLASSES)

    def _find_misspelling(self, found: Issues, label: Any, usual: str) -> None:
        message = f"label {label!r} looks like {usual!r} ({self.counts[usual]:,} rows)"
        locations = self._locations[label]
        for at in range(self.counts[label]):
            found.add("label_spelling", locations[min(at, len(locations) - 1)], message)

    def _find_imbalance(self, found: Issues) -> None:
        most = max(self.counts, key=lambda label: self.counts[label])
        for label, count in self.counts.items():
            if _RARE * count <= self.counts[most]:
                message = f"label {label!r} has {count:,} rows, {most!r} has {self.counts[most]:,}"
                found.add("imbalance", self._locations[label][0], message, "look at macro F1, not at accuracy")

    def certain(self) -> dict[str, str]:
        """Return for each misspelt label the label that is certainly meant: only case or separators differ.

        The meant label is a given one or the most frequent. A label of a single letter stands for itself, and so does
        one that may be any of several given ones.
        """
        names = [label for label in self.counts if isinstance(label, str)]
        alike: dict[str, list[str]] = {}
        for label in self._given or sorted(names, key=lambda name: -self.counts[name]):
            alike.setdefault(plain(label), []).append(label)
        known = self._given or ()
        found = {}
        for label in (name for name in names if name not in known and sum(map(str.isalnum, name)) > 1):
            meant = alike.get(plain(label), [])
            if meant and meant[0] != label and (len(meant) == 1 or not known):
                found[label] = meant[0]
        return found

    def misspellings(self) -> dict[str, str]:
        """Return for each label the more frequent one that it looks like: other case or separators, or one wrong letter."""
        names = [label for label in self.counts if isinstance(label, str)]
        usual: dict[str, str] = {}
        for label in sorted(names, key=lambda name: -self.counts[name]):
            usual.setdefault(plain(label), label)
        unlike = {label: usual[plain(label)] for label in names if usual[plain(label)] != label}
        if self._tags:
            return unlike
        for label in (name for name in names if name not in unlike):
            near = [other for other in usual.values() if slip(plain(label), plain(other))]
            frequent = [other for other in near if self.counts[other] >= _RARE * self.counts[label]]
            if frequent:
                unlike[label] = max(frequent, key=lambda name: self.counts[name])
        return unlike

    def _unknown(self, label: Any) -> str | None:
        if self._given is None or label in self._given or isinstance(label, float):
            return None
        if isinstance(label, int):
            beyond = not 0 <= label < len(self._given)
            return f"label {label}, expected a number below {len(self._given)}" if beyond else None
        hint = did_you_mean(str(label), self._given)
        return f"label {label!r} is none of the {len(self._given)} given" + (f"; {hint}" if hint else "")


def plain(name: str) -> str:
    """Return ``name`` in lower case, with one space between its words."""
    return _SEPARATORS.sub(" ", name.strip().casefold())


def slip(one: str, other: str, shortest: int = 4) -> bool:
    """Whether one letter was left out, added, exchanged, or swapped with its neighbor.

    False for words with fewer than ``shortest`` letters, and where a digit differs: digits distinguish names.
    """
    if min(len(one), len(other)) < shortest or abs(len(one) - len(other)) > 1:
        return False
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    if any(sign.isdigit() for sign in one + other):
        return False
    return max(len(one), len(other)) == 1 or (len(one) == 2 and one == other[::-1])
