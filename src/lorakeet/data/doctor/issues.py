"""The kinds of problems that data can have, how grave each is, and a counter that keeps the first few of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["stops", "warns"]

#: Kind -> how grave it is (``stops``: it would spoil a run), and what it is in words. In the order of a report.
PROBLEMS: dict[str, tuple[Severity, str]] = {
    "unreadable": ("stops", "sources that cannot be read"),
    "broken": ("stops", "records that cannot be read"),
    "encoding": ("stops", "records that are not UTF-8"),
    "columns": ("stops", "columns that do not make rows for the task"),
    "nothing": ("stops", "nothing to learn in any row"),
    "wrong_type": ("stops", "values of a wrong type"),
    "half_character": ("stops", "texts with half a character, which cannot be written as UTF-8"),
    "role": ("stops", "conversations with an unknown role"),
    "template": ("stops", "conversations that the chat template refuses"),
    "tag_count": ("stops", "rows with more or fewer tags than tokens"),
    "answer_place": ("stops", "answers that are not at their stated place"),
    "label_unknown": ("stops", "labels that are not among the given ones"),
    "one_label": ("stops", "one label in all rows: nothing to tell apart"),
    "misspelt_column": ("warns", "columns that may be misspelt"),
    "null": ("warns", "rows where a value is missing"),
    "empty": ("warns", "empty rows"),
    "empty_word": ("warns", "rows with an empty token among their tokens"),
    "duplicate": ("warns", "rows that repeat an earlier one"),
    "near_duplicate": ("warns", "rows that repeat an earlier one but for case, white space or encoding"),
    "conflict": ("warns", "rows that equal an earlier one, with another label"),
    "both_sides": ("warns", "rows of a test or validation file that are learned too"),
    "turns": ("warns", "conversations whose roles do not alternate"),
    "last_turn": ("warns", "conversations whose last turn is not the assistant's"),
    "empty_turn": ("warns", "conversations with an empty turn"),
    "label_spelling": ("warns", "rows whose label looks like a misspelling of another"),
    "imbalance": ("warns", "labels ten times rarer than the most frequent one"),
    "lost_character": ("warns", "texts that lost characters when they were converted (U+FFFD)"),
    "mojibake": ("warns", "texts that were read in a wrong encoding once"),
    "control": ("warns", "texts with control characters"),
    "repetitive": ("warns", "texts that repeat themselves without end"),
    "special_token": ("warns", "texts that hold a special token of the tokenizer, such as its end token"),
    "long": ("warns", "samples longer than max_length, which are cut"),
    "truncated": ("warns", "samples that lose a part of what they should teach when they are cut"),
    "nothing_learned": ("warns", "samples without anything to learn"),
    "unknown_token": ("warns", "samples with words that the base has no token for"),
    "byte_token": ("warns", "samples with characters that the base spells in bytes"),
}


@dataclass(frozen=True)
class Spot:
    """One problem: ``place`` counts lines or rows of ``source`` from 1; 0 means the source as a whole."""

    source: str
    place: int
    message: str

    def __str__(self) -> str:
        return f"{self.source}:{self.place}: {self.message}" if self.place else f"{self.source}: {self.message}"


@dataclass
class Finding:
    """All problems of one kind.

    Attributes:
        kind: one of :data:`PROBLEMS`.
        count: rows that have it (of ``imbalance``: labels).
        first: the first few of them.
    """

    kind: str
    count: int = 0
    first: list[Spot] = field(default_factory=list)

    @property
    def severity(self) -> Severity:
        return PROBLEMS[self.kind][0]

    @property
    def what(self) -> str:
        return PROBLEMS[self.kind][1]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        first = [{"source": spot.source, "place": spot.place, "message": spot.message} for spot in self.first]
        return {"kind": self.kind, "severity": self.severity, "what": self.what, "count": self.count, "first": first}


class Findings:
    """Counts problems by kind and keeps the first ``shown`` of each kind, however many there are."""

    def __init__(self, shown: int = 3) -> None:
        self.shown = shown
        self._found: dict[str, Finding] = {}

    def add(self, kind: str, source: str, place: int, message: str) -> None:
        """Count one problem."""
        finding = self._found.setdefault(kind, Finding(kind))
        finding.count += 1
        if len(finding.first) < self.shown:
            finding.first.append(Spot(source, place, message))

    def count(self, kind: str) -> int:
        """How many rows have a problem of this kind."""
        return self._found[kind].count if kind in self._found else 0

    def __iter__(self) -> Iterator[Finding]:
        """What was found, in the order of :data:`PROBLEMS`: what stops a run comes first."""
        return (self._found[kind] for kind in PROBLEMS if kind in self._found)
