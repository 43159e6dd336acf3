"""Issues of data: their codes and severities, and a counter that keeps the first few of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakeet.data.read.record import Location

Severity = Literal["stops", "warns"]

#: Code -> severity (``stops``: it would spoil a run), and description of many such issues. In the order of a report.
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
    "no_row": ("stops", "texts with a token that the base's embedding has no row for"),
    "too_long": ("stops", "samples longer than the model takes: lower data.max_length"),
    "label_unknown": ("stops", "labels that are not among the given ones"),
    "one_label": ("stops", "one label in all rows: nothing to tell apart"),
    "many_labels": ("stops", "columns of labels with more than 1,000 names"),
    "misspelt_column": ("warns", "columns that may be misspelt"),
    "unused_column": ("warns", "columns that the task has no use for, and that may matter"),
    "null": ("warns", "rows where a value is missing"),
    "empty": ("warns", "empty rows"),
    "empty_word": ("warns", "rows with an empty token among their tokens"),
    "duplicate": ("warns", "rows that repeat an earlier one"),
    "near_duplicate": ("warns", "rows that repeat an earlier one but for case, white space or encoding"),
    "conflict": ("warns", "rows that equal an earlier one, with another label"),
    "both_sides": ("warns", "rows of a test or validation file that are learned too"),
    "turns": ("warns", "conversations whose roles do not alternate"),
    "last_turn": ("warns", "conversations whose last turn is not the assistant's"),
    "unlearned_turn": (
        "warns",
        "conversations with turns that are marked as not to be learned, and so are left out of the loss",
    ),
    "marked_turn": (
        "warns",
        "conversations with turns of others marked to be learned; only the assistant's are",
    ),
    "unread": ("warns", "conversations with parts that the chat template leaves out"),
    "empty_turn": ("warns", "conversations with an empty turn"),
    "label_spelling": ("warns", "rows whose label looks like a misspelling of another"),
    "own_label": ("warns", "columns of labels that hold a label of its own for nearly every row"),
    "imbalance": ("warns", "uneven labels, at least ten times rarer than the most frequent one"),
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


#: Codes that the report of a run shows as figures of its rows, and not as warnings.
COUNTED = frozenset({"null", "empty", "duplicate", "near_duplicate"})


@dataclass(frozen=True)
class Issue:
    """Problem of a row or of a whole source.

    Attributes:
        code: one of :data:`PROBLEMS`.
        location: of the row.
        message: a phrase without the location.
        hint: how to correct it, if known.
    """

    code: str
    location: Location
    message: str
    hint: str | None = None

    @property
    def severity(self) -> Severity:
        return PROBLEMS[self.code][0]

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


@dataclass
class IssueGroup:
    """Issues with the same code.

    Attributes:
        code: one of :data:`PROBLEMS`.
        count: rows that have it (of ``imbalance``: labels).
        first: the first few of them.
    """

    code: str
    count: int = 0
    first: list[Issue] = field(default_factory=list)

    @property
    def severity(self) -> Severity:
        return PROBLEMS[self.code][0]

    @property
    def description(self) -> str:
        return PROBLEMS[self.code][1]

    def to_dict(self) -> dict[str, Any]:
        """Return the group for JSON."""
        first = [
            {"source": issue.location.source, "place": issue.location.number, "message": issue.message}
            for issue in self.first
        ]
        return {
            "kind": self.code,
            "severity": self.severity,
            "what": self.description,
            "count": self.count,
            "first": first,
        }


class Issues:
    """Counts issues by code and keeps the first ``shown`` of each code."""

    def __init__(self, shown: int = 3) -> None:
        self.shown = shown
        self._groups: dict[str, IssueGroup] = {}

    def add(self, code: str, location: Location, message: str, hint: str | None = None) -> None:
        """Count an issue.

        Args:
            code: one of :data:`PROBLEMS`.
            location: of the row.
            message: a phrase without the location.
            hint: how to correct it, if known.
        """
        group = self._groups.setdefault(code, IssueGroup(code))
        group.count += 1
        if len(group.first) < self.shown:
            group.first.append(Issue(code, location, message, hint))

    def count(self, code: str) -> int:
        """Return the number of issues of this code."""
        return self._groups[code].count if code in self._groups else 0

    def __iter__(self) -> Iterator[IssueGroup]:
        """Iterate over the groups in the order of :data:`PROBLEMS`: those that stop a run come first."""
        return (self._groups[code] for code in PROBLEMS if code in self._groups)
