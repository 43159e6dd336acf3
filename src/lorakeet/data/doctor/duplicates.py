"""Rows that repeat each other, known by hashes: 32 bytes a row are kept, never a text."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from lorakeet.data.rows.kinds import find_kind
from lorakeet.data.rows.split import normalized

_PLACE_BITS = 40  # a source's number above, a line's below


@dataclass(frozen=True)
class Repeat:
    """``kind``: duplicate, near_duplicate or conflict; the row is number ``row``, what it repeats ``first``, from 0."""

    kind: str
    row: int
    first: int


class Repeats:
    """What was seen, in the order in which it came."""

    def __init__(self) -> None:
        self._sources: dict[str, int] = {}
        self._places, self._exact, self._inputs, self._near = (array("Q") for _ in range(4))

    def add(self, source: str, place: int, values: Mapping[str, Any], kind: str) -> None:
        """Take a canonical row into account."""
        number = self._sources.setdefault(source, len(self._sources))
        given, answer = _halves(values, kind)
        same = hash_of(normalized(given))
        self._places.append(number << _PLACE_BITS | place)
        self._exact.append(_joined(given, answer))
        self._inputs.append(same)
        self._near.append(hash_of(f"{same}\0{normalized(answer)}"))

    def __len__(self) -> int:
        return len(self._places)

    def place(self, row: int) -> tuple[str, int]:
        """Source and line (or row) of the row that came as number ``row``, from 0."""
        number, place = divmod(self._places[row], 1 << _PLACE_BITS)
        return list(self._sources)[number], place

    def found(self) -> Iterator[Repeat]:
        """Every row that repeats an earlier one, in order; each once: as an exact, a near or a contradicting repeat."""
        exact, near, inputs = (_firsts(hashes) for hashes in (self._exact, self._near, self._inputs))
        rows = np.arange(len(self))
        for row in np.flatnonzero(inputs != rows):
            kind = "duplicate" if exact[row] != row else "near_duplicate" if near[row] != row else "conflict"
            firsts = {"duplicate": exact, "near_duplicate": near, "conflict": inputs}[kind]
            yield Repeat(kind, int(row), int(firsts[row]))

    def seen(self) -> Seen:
        """The same rows, to be asked whether another row's inputs are among them."""
        return Seen(np.frombuffer(self._inputs, dtype=np.uint64) if len(self) else np.zeros(0, np.uint64))


class Seen:
    """Sorted hashes of inputs [rows], uint64, and where each came from."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def find(self, values: Mapping[str, Any], kind: str) -> int | None:
        """The number of the first row with the inputs of ``values``, but for case and white space; None if there is none."""
        wanted = np.uint64(hash_of(normalized(_halves(values, kind)[0])))
        at = int(np.searchsorted(self._sorted, wanted))
        return int(self._order[at]) if at < len(self._sorted) and self._sorted[at] == wanted else None


def exact_hash(values: Mapping[str, Any], kind: str) -> int:
    """Equal for canonical rows that are duplicates of each other."""
    return _joined(*_halves(values, kind))


def _joined(given: str, answer: str) -> int:
    return hash_of(f"{given}\0{answer}")


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b: among ten million texts, two alike by chance have odds of 1 in 400,000."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _firsts(hashes: array[int]) -> np.ndarray:
    """For each row the number of the first row with the same hash [rows]."""
    values = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.zeros(0, np.uint64)
    order = np.argsort(values, kind="stable")
    fresh = np.ones(len(values), dtype=bool)
    fresh[1:] = values[order][1:] != values[order][:-1]
    begins = np.maximum.accumulate(np.where(fresh, np.arange(len(values)), 0))
    firsts = np.empty(len(values), dtype=np.int64)
    firsts[order] = order[begins]
    return firsts


def _halves(values: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """What a row gives and what it asks for, where a second answer to the same would be a contradiction."""
    if kind == "messages":
        return f"{values['messages']}\0{values.get('tools') or ''}", ""
    rules = find_kind(kind)
    answers = rules.answers_of(values)
    return "\0".join(rules.texts_of(values)), json.dumps(answers) if answers else ""
