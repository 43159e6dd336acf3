"""The labels of all rows: counted, compared with the given ones and with each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lorakeet.data.doctor.issues import Findings, Spot
from lorakeet.errors import did_you_mean

_MOST = 1000  # different labels; more are no classes
_RARE = 10  # a label is rare where another is so many times more frequent
_SEPARATORS = re.compile(r"[\s_-]+")


class Labels:
    """Counts in how many rows each label stands, as they go by; keeps the first few places of each.

    Args:
        given: names of the labels in their order (``task.labels``), or None to find them.
        tags: they are tags of tokens, of which one is as a rule by far the most frequent.
        shown: how many places of each label are kept.
    """

    def __init__(self, given: Sequence[str] | None, *, tags: bool = False, shown: int = 3) -> None:
        self._given = given
        self._tags = tags
        self._shown = shown
        self._several = False  # rows with more than one label, or none
        self._too_many = False
        self.counts: dict[Any, int] = {}
        self._spots: dict[Any, list[Spot]] = {}

    def of_tags(self, tags: bool) -> None:
        """Whether what follows are tags of tokens."""
        self._tags = tags

    def add(self, source: str, place: int, label: Any) -> str | None:
        """Count the label or labels of one row; a complaint if one of them is none of the given ones."""
        self._several |= isinstance(label, list) and not self._tags
        different = list(dict.fromkeys(label if isinstance(label, list) else [label]))
        for one in different if not self._too_many else ():
            self.counts[one] = self.counts.get(one, 0) + 1
            spots = self._spots.setdefault(one, [])
            if len(spots) < self._shown:
                spots.append(Spot(source, place, ""))
        if len(self.counts) > _MOST:
            self._too_many = True
            self.counts.clear()
            self._spots.clear()
        return next(filter(None, map(self._unknown, different)), None)

    def find(self, found: Findings) -> None:
        """Add what only all labels together can tell."""
        if self._too_many or len(self.counts) == 0 or any(isinstance(label, float) for label in self.counts):
            return
        if len(self.counts) == 1 and sum(self.counts.values()) > 1 and not self._several:
            [label] = self.counts
            self._tell(found, "one_label", label, f"every row has the label {label!r}", 1)
        if self._given is None:
            for label, usual in self.misspellings().items():
                message = f"label {label!r} looks like {usual!r} ({self.counts[usual]:,} rows)"
                self._tell(found, "label_spelling", label, message, self.counts[label])
        most = max(self.counts, key=lambda label: self.counts[label])
        for label, count in self.counts.items() if not self._tags else ():
            if _RARE * count <= self.counts[most]:
                message = f"label {label!r} has {count:,} rows, {most!r} has {self.counts[most]:,}"
                self._tell(found, "imbalance", label, message, 1)

    def certain(self) -> dict[str, str]:
        """Label -> the one that it certainly is, a given one or the most frequent: only case or separators differ.

        A label of a single letter stands for itself, and so does one that may be any of several given ones.
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
        """Label -> the more frequent one that it looks like: other case or separators, or one letter amiss."""
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

    def _tell(self, found: Findings, kind: str, label: Any, message: str, count: int) -> None:
        for at in range(count):
            spot = self._spots[label][min(at, len(self._spots[label]) - 1)]
            found.add(kind, spot.source, spot.place, message)


def plain(name: str) -> str:
    """``name`` without regard to case and to what separates its words."""
    return _SEPARATORS.sub(" ", name.strip().casefold())


def slip(one: str, other: str, shortest: int = 4) -> bool:
    """Whether one letter was left out, added, exchanged, or swapped with its neighbour; digits tell names apart.

    Of words with fewer than ``shortest`` letters that is never said.
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
