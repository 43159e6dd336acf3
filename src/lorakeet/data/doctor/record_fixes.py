"""Certain fixes of one record, step by step; the rest stays as it was.

| step    | fix                                                                                                    |
|---------|--------------------------------------------------------------------------------------------------------|
| columns | the name of a column that the record lacks, but for case or a letter, and that no whole record has     |
| numbers | labels and tags written as strings where the others are numbers, or the other way round; CSV's numbers |
| texts   | letters garbled on their way, control characters, halves of characters (``text_damage``)              |
| answers | starts that moved with their text, or that are wrong where the answer stands only once in its context  |
| turns   | names of members and roles likewise; turns after the last of the assistant, from which nothing is learned |
| labels  | a label that differs from the usual or given one in case or separators alone                           |

A step that would bring a worse problem is not taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from lorakeet.chat.template import ROLES
from lorakeet.data.doctor.checks import Problems, diagnose
from lorakeet.data.doctor.issues import PROBLEMS
from lorakeet.data.doctor.label_stats import plain, slip
from lorakeet.data.doctor.text_damage import damages, mended
from lorakeet.data.read.column_types import reads_as, value_of
from lorakeet.data.read.record import Record
from lorakeet.data.rows.column_mapping import known_names
from lorakeet.data.rows.conversations import SPEAKERS, to_json
from lorakeet.data.rows.kinds import Layout, find_kind

Values = dict[str, Any]

_WORSE = {kind for kind, (severity, _) in PROBLEMS.items() if severity == "stops"} | {"empty_word"}


@dataclass(frozen=True)
class FixedRecord:
    """A record, what it is as a canonical row (None: it is none), what is still wrong with it, and what was mended."""

    values: Values
    canonical: Mapping[str, Any] | None
    problems: Problems
    fixes: Problems


@dataclass
class RecordFixer:
    """Mends the records of one source.

    Attributes:
        layout: which column plays which part.
        numbers: the columns of a CSV file that hold nothing but numbers; None for a source that has types.
        cut: only what the assistant says is learned, so that nothing is learned from turns after its last one.
        beside: columns that look misspelt but stand in whole records, and so are columns of their own.
        labels: how labels are to be written.
        names: all labels, as they are.
    """

    layout: Layout
    numbers: Collection[str] | None = None
    cut: bool = True
    beside: set[str] = field(default_factory=set)
    labels: Mapping[Any, str] = field(default_factory=dict)
    names: Collection[Any] = ()

    def __call__(self, row: Record) -> FixedRecord:
        """Fix ``row``, which has no fault."""
        values: Values = dict(row.values or {})
        canonical, problems = self._diagnosed(row, values)
        fixes: Problems = {}
        for step in (self._columns, self._numbers, self._texts, self._turns, self._labels):
            words: Problems = {}
            after = step(values, words)
            if after == values:
                continue
            made, left = self._diagnosed(row, after)
            worse = left.keys() - problems.keys()
            if step == self._columns:
                refused = bool({"wrong_type"} & worse) or "null" in left
            else:
                refused = canonical is not None and bool(_WORSE & worse)  # a record that made no row hides the others
            if not refused:
                values, canonical, problems = after, made, left
                fixes = {**words, **fixes}
        if self._teaches_nothing(canonical, problems):
            problems["nothing_learned"] = "no turn of the assistant"
        return FixedRecord(values, canonical, problems, fixes)

    def may_be_misspelt(self, values: Mapping[str, Any]) -> set[str]:
        """Return the columns of a complete record that look misspelt, which this record shows they are not."""
        used = [column for column in self.layout.columns.values() if "." not in column]
        free = values.keys() - used - self.beside
        if not free or not values.keys() >= set(used):
            return set()
        return {name for name in free if any(_is_misspelt(name, column) for column in used)}

    def _diagnosed(self, row: Record, values: Values) -> tuple[Mapping[str, Any] | None, Problems]:
        return diagnose(replace(row, values=values), self.layout, typed=self.numbers is None)[:2]

    def _teaches_nothing(self, canonical: Mapping[str, Any] | None, problems: Problems) -> bool:
        if canonical is None or self.layout.kind != "messages" or not self.cut or problems.keys() & {"null", "role"}:
            return False
        return all(turn["role"] != "assistant" for turn in json.loads(canonical["messages"])[canonical["given"] :])

    def _columns(self, values: Values, fixes: Problems) -> Values:
        free = values.keys() - set(self.layout.columns.values()) - self.beside
        named: dict[str, str] = {}
        for role, column in self.layout.columns.items():
            meant = [name for name in free if _is_misspelt(name, column)]
            if column not in values and "." not in column and len(meant) == 1:
                named[meant[0]] = column
                fixes["misspelt_column"] = f"column {meant[0]!r} is now {column!r}, the {role}"
        return _renamed(values, named)

    def _numbers(self, values: Values, fixes: Problems) -> Values:
        columns, after = self.layout.columns, dict(values)
        counted = {columns.get("label"), columns.get("answer_start")}
        for name in self.numbers or ():
            if name in counted or name not in columns.values():
                after[name] = _number(values[name], exact=name not in counted)
        role = find_kind(self.layout.kind).labels or ""
        column = columns.get(role, "")
        if self.numbers is None and column in values:
            kind = self.layout.types[role].base if role in self.layout.types else "str"
            after[column] = _each(values[column], lambda label: self._as_others(label, kind))
            if after[column] != values[column]:
                fixes["wrong_type"] = f"column {column!r} holds {after[column]!r:.40} now, written as in the other rows"
        return after

    def _as_others(self, label: Any, kind: str) -> Any:
        """Convert a label to a number where the others are numbers, or to a string."""
        if isinstance(label, str):
            return _number(label) if kind in ("int", "float") and reads_as(label) in ("int", kind) else label
        is_number = isinstance(label, int) and not isinstance(label, bool)
        return str(label) if is_number and kind == "str" and str(label) in self.names else label

    def _texts(self, values: Values, fixes: Problems) -> Values:
        after = {name: _whole(value, fixes) for name, value in values.items()}
        if self.layout.kind == "question":
            _Answers(self.layout, fixes).place(values, after)
        return after

    def _turns(self, values: Values, fixes: Problems) -> Values:
        after = dict(values)
        for role in ("messages", "conversations", "prompt", "completion") if self.layout.kind == "messages" else ():
            column = self.layout.columns.get(role, "")
            value = values.get(column)
            is_json = isinstance(value, str) and role in ("messages", "conversations")
            turns = _parsed(value) if is_json else value
            if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
                continue
            made = [_turn(_whole(turn, fixes), fixes) for turn in turns]
            if role != "prompt" and self.cut:
                made = _ended(made, fixes)
            if made != turns:
                after[column] = to_json(made) if is_json else made
        return after

    def _labels(self, values: Values, fixes: Problems) -> Values:
        column = self.layout.columns.get(find_kind(self.layout.kind).labels or "label", "")
        value = values.get(column)
        if not self.labels or value is None:
            return values
        words = self.layout.kind == "tags" and isinstance(value, str)  # tags between blanks
        made = _each(value.split() if words else value, self._spelt)
        if made != (value.split() if words else value):
            fixes["label_spelling"] = f"label {value!r:.40} is now {made!r:.40}"
            return {**values, column: " ".join(made) if words else made}
        return values

    def _spelt(self, label: Any) -> Any:
        return self.labels.get(label.strip(), label) if isinstance(label, str) else label


@dataclass(frozen=True)
class _Answers:
    """Puts right where answers begin, in each form in which they are written."""

    layout: Layout
    fixes: Problems

    def place(self, before: Values, after: Values) -> None:
        """Change ``after``, whose texts are those of ``before`` mended."""
        columns = self.layout.columns
        old, new = (value_of(values, columns["context"]) for values in (before, after))
        if not isinstance(old, str) or not isinstance(new, str):
            return
        contexts, column = (old, new), columns["answers"]
        old, new = before.get(column), after.get(column)
        if isinstance(new, list) and all(isinstance(answer, dict) for answer in new):
            after[column] = [self._dict(contexts, *answers) for answers in zip(old or [], new, strict=True)]
        elif isinstance(new, dict):
            after[column] = self._dict(contexts, old, new)
        elif (starts := columns.get("answer_start")) in after:
            after[str(starts)] = self._starts(contexts, old, new, after[str(starts)])

    def _dict(self, contexts: tuple[str, str], old: Any, new: Values) -> Values:
        if not new.keys() >= {"text", "answer_start"}:
            return new
        return {**new, "answer_start": self._starts(contexts, old["text"], new["text"], new["answer_start"])}

    def _starts(self, contexts: tuple[str, str], old: Any, new: Any, starts: Any) -> Any:
        if not isinstance(starts, list):
            was, now = (text[0] if isinstance(text, list) and len(text) == 1 else text for text in (old, new))
            return self._start(contexts, was, now, starts)
        if not isinstance(new, list) or len(new) != len(starts):
            return starts
        return [self._start(contexts, was, now, start) for was, now, start in zip(old, new, starts, strict=True)]

    def _start(self, contexts: tuple[str, str], old: Any, new: Any, start: Any) -> Any:
        """Return the start of the answer ``new``, which was ``old`` at ``start``; ``start`` itself if that is uncertain."""
        before, after = contexts
        if not isinstance(new, str) or not new or not isinstance(start, int) or start < 0:
            return start
        right = before.startswith(old, start)
        moved = len(mended(before[:start])) if right else start
        if after.startswith(new, moved):
            return moved
        first = after.find(new)
        if first < 0 or after.find(new, first + 1) >= 0:
            return start
        if not right:
            self.fixes["answer_place"] = f"{new!r:.40} stands at {first}, not at {start}"
        return first


@lru_cache(1 << 16)
def _is_misspelt(name: str, wanted: str) -> bool:
    """Whether ``name`` is ``wanted`` but for case, separators or a letter, and no name of anything else."""
    alike = plain(name) == plain(wanted) or slip(plain(name), plain(wanted))
    return alike and (name.lower() not in known_names() or name.lower() == wanted.lower())


def _renamed(values: Values, names: Mapping[str, str]) -> Values:
    return {names.get(name, name): value for name, value in values.items()}


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [change(one) for one in value] if isinstance(value, list) else change(value)


def _number(text: Any, exact: bool = False) -> Any:
    """Convert a field of a CSV file to a number, None where it is empty; ``exact``: only if no character is lost."""
    kind = reads_as(text) if isinstance(text, str) else "str"
    made = None if not kind else int(text) if kind == "int" else float(text) if kind == "float" else text
    return text if exact and made is not None and str(made) != text else made


def _whole(value: Any, fixes: Problems) -> Any:
    """Fix every text in ``value``."""
    if isinstance(value, str):
        after = mended(value)
        if after != value:
            fixes |= {kind: words for kind, words in damages(value).items() if kind not in ("lost_character", *fixes)}
        return after
    if isinstance(value, dict):
        return {name: _whole(inner, fixes) for name, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner, fixes) for inner in value]
    return value


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _turn(turn: Values, fixes: Problems) -> Values:
    """Fix the names of the members of a message, and its role."""
    for name, other in (("role", "from"), ("content", "value")):
        if name in turn or other in turn or (name == "content" and turn.get("tool_calls")):
            continue
        meant = {key: wanted for key in turn for wanted in (name, other) if _is_misspelt(key, wanted)}
        if len(meant) == 1:
            turn = _renamed(turn, meant)
            fixes["misspelt_column"] = " is now ".join(map(repr, *meant.items()))
    key = "role" if "role" in turn else "from"
    said = turn.get(key)
    if isinstance(said, str) and _role_of(turn) not in ROLES and (meant_role := _meant_role(said)):
        fixes["role"] = f"role {said!r} is now {meant_role!r}"
        turn = {**turn, key: meant_role}
    return turn


def _role_of(turn: Values) -> Any:
    """Return the role of a message, as :mod:`~lorakeet.data.rows.conversations` reads it."""
    if "role" in turn or not isinstance(turn.get("from"), str):
        return turn.get("role")
    speaker = turn["from"].lower()
    return SPEAKERS.get(speaker, speaker)


def _meant_role(said: str) -> str | None:
    word = said.strip().lower()
    near = [role for role in ROLES if word == role or slip(word, role, 3)]
    return SPEAKERS.get(word) or (near[0] if len(near) == 1 else None)


def _ended(turns: list[Values], fixes: Problems) -> list[Values]:
    """Drop the turns after the last one of the assistant."""
    roles = [_role_of(turn) for turn in turns]
    if "assistant" not in roles or not set(roles) <= set(ROLES):
        return turns
    end = len(roles) - roles[::-1].index("assistant")
    if end < len(turns):
        fixes["last_turn"] = f"{len(turns) - end} after the assistant's last, of the {roles[-1]}"
    return turns[:end]
