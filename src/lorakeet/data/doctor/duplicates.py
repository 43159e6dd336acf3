"""Rows that repeat each other, found by hashes: 36 bytes a row are kept, never a text."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lorakeet.data.read.record import Location, Locations
from lorakeet.data.rows.kinds import Kind
from lorakeet.data.rows.split import normalized


@dataclass(frozen=True)
class Repeat:
    """A row that repeats an earlier one.

    Attributes:
        code: duplicate, near_duplicate or conflict.
        row: its number, from 0.
        first: number of the row that it repeats.
    """

    code: str
    row: int
    first: int


class Inputs(NamedTuple):
    """Texts of a row, and the answer that it asks for: another answer to the same texts is a contradiction.

    Attributes:
        exact: hash of texts and answer.
        texts: the texts, normalized.
        same: hash of the normalized texts.
        near: hash of the normalized texts and the normalized answer.
    """

    exact: int
    texts: list[str]
    same: int
    near: int


def hash_inputs(values: Mapping[str, Any], kind: Kind, texts: Sequence[str] | None = None) -> Inputs:
    """Hash a usable canonical row.

    Hashes are Python's own, 64 bits with a key of this process (SipHash): among ten million texts, two of the same
    hash by chance have odds of 1 in 400,000.

    Args:
        values: canonical columns.
        kind: of the row.
        texts: all its texts, where they are known.
    """
    if kind.name == "messages":
        texts = [values["messages"], values.get("tools") or ""]
    elif texts is None:
        texts = kind.texts_of(values)
    answers = kind.answers_of(values)
    answer = json.dumps(answers) if answers else ""
    clean = [normalized(text) for text in texts]
    same = hash("\0".join(clean))
    exact = hash("\0".join((*texts, answer)))
    return Inputs(exact, clean, same, hash((same, normalized(answer))) if answer else same)


class Repeats:
    """Hashes of rows, in the order in which they came.

    Attributes:
        locations: of the rows.
    """

    def __init__(self) -> None:
        self.locations = Locations()
        self._exact, self._same, self._near = (array("q") for _ in range(3))

    def add(self, inputs: Inputs) -> None:
        """Add a row; its location is the caller's to add."""
        self._exact.append(inputs.exact)
        self._same.append(inputs.same)
        self._near.append(inputs.near)

    def __len__(self) -> int:
        return len(self._exact)

    def found(self) -> Iterator[Repeat]:
        """Yield every row that repeats an earlier one, in order, each once: as an exact, a near or a contradicting one."""
        exact, near, same = (_firsts(hashes) for hashes in (self._exact, self._near, self._same))
        rows = np.arange(len(self))
        for row in np.flatnonzero(same != rows):
            code = "duplicate" if exact[row] != row else "near_duplicate" if near[row] != row else "conflict"
            firsts = {"duplicate": exact, "near_duplicate": near, "conflict": same}[code]
            yield Repeat(code, int(row), int(firsts[row]))

    def index(self) -> RepeatIndex:
        """Return an index of the same rows by their texts."""
        hashes = np.frombuffer(self._same, dtype=np.int64) if len(self) else np.zeros(0, np.int64)
        return RepeatIndex(hashes, self.locations)


class RepeatIndex:
    """Sorted hashes of the texts of rows, int64 [rows], and the locations of the rows."""

    def __init__(self, hashes: np.ndarray, locations: Locations) -> None:
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._locations = locations

    def find(self, inputs: Inputs) -> Location | None:
        """Return the location of the first row with the same texts but for case and white space; None if there is none."""
        at = int(np.searchsorted(self._sorted, np.int64(inputs.same)))
        if at == len(self._sorted) or self._sorted[at] != inputs.same:
            return None
        return self._locations[int(self._order[at])]


def _firsts(hashes: array[int]) -> np.ndarray:
    """Return for each row the number of the first row with the same hash [rows]."""
    values = np.frombuffer(hashes, dtype=np.int64) if hashes else np.zeros(0, np.int64)
    order = np.argsort(values, kind="stable")
    fresh = np.ones(len(values), dtype=bool)
    fresh[1:] = values[order][1:] != values[order][:-1]
    begins = np.maximum.accumulate(np.where(fresh, np.arange(len(values)), 0))
    firsts = np.empty(len(values), dtype=np.int64)
    firsts[order] = order[begins]
    return firsts
