"""What can be wrong with one row, told from its canonical columns alone: kind of problem -> what it is in this row.

The kinds are those of :data:`lorakeet.data.doctor.issues.PROBLEMS`; each is told at most once a row.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from lorakeet.chat_template import ROLES
from lorakeet.data.doctor.text_damage import damages
from lorakeet.data.read.column_types import value_of
from lorakeet.data.read.record import Record
from lorakeet.data.rows.conversations import message_texts
from lorakeet.data.rows.kinds import Layout, RowError, canonical, find_kind
from lorakeet.errors import did_you_mean

#: Roles that follow each other in a conversation; None: its beginning.
_FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_LONG, _LOOKED_AT = 200, 20_000  # characters of a text that may be called repetitive, and of it that are looked at
_REPETITIVE = 0.08  # size of such a text when compressed, as a share; English prose stays above 0.3

Problems = dict[str, str]


def check_row(values: Mapping[str, Any], kind: str) -> Problems:
    """What is wrong with a canonical row of ``kind``; ``null`` and ``empty`` mean that nothing can be learned from it."""
    rules = find_kind(kind)
    if missing := rules.missing(values):
        return {"null": f"no {' and no '.join(missing)}"}
    if kind == "messages":
        messages = json.loads(values["messages"])
        return _checked_turns(messages) | _checked_texts(message_texts(messages))
    if blank := rules.blank(values):
        return {"empty": f"{' and '.join(blank)} without text"}
    texts = rules.texts_of(values)
    problems = _checked_texts(texts)
    if kind == "tags" and "" in texts:
        problems["empty_word"] = f"token {texts.index('') + 1} of {len(texts)} is empty"
    elif kind == "question":
        problems |= _checked_answers(values["context"], values["answers"], values["answer_start"])
    return problems


def diagnose(row: Record, layout: Layout, *, typed: bool = True) -> tuple[dict[str, Any] | None, Problems]:
    """The canonical columns of a record, None where it makes no row, and what is wrong with it.

    Args:
        row: without a fault.
        layout: which of its columns plays which part.
        typed: it tells numbers from strings, as all formats but CSV do.
    """
    try:
        values = canonical(row, layout)
    except RowError as error:
        return None, {error.fault.code: error.fault.message}
    problems = check_row(values, layout.kind)
    if misspelt := _misspelt(row, layout):
        problems["misspelt_column"] = misspelt
    if typed and (number := _number_as_text(row, layout)):
        problems["wrong_type"] = number
    return values, problems


def special_tokens_in(texts: Sequence[str], special: Sequence[str]) -> str | None:
    """A complaint about a special token that a text spells out, if there is one."""
    found = next((token for token in special for text in texts if token in text), None)
    return f"{found} is in the text and will be read as the special token" if found else None


def _misspelt(row: Record, layout: Layout) -> str | None:
    """A complaint about a row that lacks a column and has one of a similar name."""
    values = row.values or {}
    for role, column in layout.columns.items():
        if column in values or "." in column:
            continue
        free = [name for name in values if name not in layout.columns.values()]
        if near := get_close_matches(column, free, 1, 0.7):
            return f"no {role}, but {near[0]!r}; is {column!r} meant?"
    return None


def _number_as_text(row: Record, layout: Layout) -> str | None:
    """A complaint about a label or tag that is a string where those of the other rows are numbers."""
    role = find_kind(layout.kind).labels
    if role is None or role not in layout.types or layout.types[role].base not in ("int", "float"):
        return None
    value = value_of(row.values or {}, layout.columns[role])
    text = next((one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one), None)
    return (
        text and f"column {layout.columns[role]!r} holds {text!r:.40}, a string, expected a number as in the other rows"
    )


def _checked_texts(texts: Sequence[str] | Iterator[str]) -> Problems:
    problems: Problems = {}
    for text in texts:
        for kind, message in damages(text).items():
            problems.setdefault(kind, message)
        if len(text) >= _LONG and "repetitive" not in problems:
            begun = text[:_LOOKED_AT].encode(errors="replace")
            if (left := len(zlib.compress(begun, 1)) / len(begun)) < _REPETITIVE:
                problems["repetitive"] = f"compressed, {100 * left:.1f} % of its size is left: {text[:30]!r}..."
    return problems


def _checked_turns(messages: Sequence[Mapping[str, Any]]) -> Problems:
    problems: Problems = {}
    before = None
    for number, message in enumerate(messages, start=1):
        for kind, text in _checked_turn(message, before).items():
            problems.setdefault(kind, f"message {number} {text}")
        before = message.get("role")
    if "role" not in problems and before != "assistant":
        problems["last_turn"] = f"message {len(messages)}, the last, is of the {before}: nothing after it is learned"
    if "role" in problems:
        problems.pop("turns", None)  # the one comes of the other
    return problems


def _checked_turn(message: Mapping[str, Any], before: str | None) -> Problems:
    problems: Problems = {}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        problems["role"] = f"has role {role!r}, expected {', '.join(ROLES)}" + (f"; {hint}" if hint else "")
    elif role not in _FOLLOWS.get(before, ROLES):
        problems["turns"] = f"of the {role} " + (f"follows one of the {before}" if before else "is the first")
    calls = message.get("tool_calls")
    if content is None and not calls and (near := get_close_matches("content", message.keys() - {"content"}, 1, 0.7)):
        problems["misspelt_column"] = f"has {near[0]!r}; is 'content' meant?"
    elif not calls and (not content or (isinstance(content, str) and content.isspace())):
        problems["empty_turn"] = f"of the {role} is empty"
    return problems


def _checked_answers(context: str, answers: Sequence[str], starts: Sequence[int]) -> Problems:
    for answer, start in zip(answers, starts, strict=True):
        if not answer:
            return {"answer_place": "an answer without text; a question without an answer has no answers"}
        if start < 0 or context[start : start + len(answer)] != answer:
            at = context.find(answer)
            hint = f"; it stands at {at}" if at >= 0 else "; it is nowhere in the context"
            return {"answer_place": f"{_short(answer)} is not at {start}{hint}"}
    return {}


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
