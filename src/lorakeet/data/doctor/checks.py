"""Checks of one row, on its canonical columns alone.

The result maps codes of :data:`lorakeet.data.doctor.issues.PROBLEMS` to messages: at most one of each code a row.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from lorakeet.chat.messages import unread_members
from lorakeet.chat.template import ROLES
from lorakeet.data.doctor.text_damage import damages
from lorakeet.data.read.column_types import value_of
from lorakeet.data.read.record import Record
from lorakeet.data.rows.conversations import message_texts
from lorakeet.data.rows.kinds import Kind, Layout, RowError, canonical, find_kind
from lorakeet.errors import did_you_mean

#: Role -> roles that may follow it in a conversation; None: its beginning.
_FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
#: Characters. Only longer texts can be repetitive, and only this many of them are compressed.
_LONG, _COMPRESSED = 200, 20_000
#: Ratio of compressed to original size below which a text is repetitive; English prose stays above 0.3.
_REPETITIVE = 0.08

Problems = dict[str, str]


class Checked(NamedTuple):
    """Result of :func:`check_row`.

    Attributes:
        problems: code -> message.
        texts: all texts of a usable row.
    """

    problems: Problems
    texts: Sequence[str] = ()


class CheckedRecord(NamedTuple):
    """Result of :func:`diagnose`.

    Attributes:
        row: the canonical columns; None where the record makes no row.
        problems: code -> message.
        texts: all texts of a usable row.
    """

    row: dict[str, Any] | None
    problems: Problems
    texts: Sequence[str] = ()


def check_row(values: Mapping[str, Any], kind: Kind, template: Any = None) -> Checked:
    """Check a canonical row on its own; a row with the problem ``null`` or ``empty`` is not usable.

    Args:
        values: canonical columns.
        kind: of the row.
        template: of the tokenizer for conversations; None: unknown.
    """
    if missing := kind.missing(values):
        return Checked({"null": f"no {' and no '.join(missing)}"})
    if blank := kind.blank(values):
        return Checked({"empty": f"{' and '.join(blank)} without text"})
    if kind.name == "messages":
        messages = json.loads(values["messages"])
        texts = list(message_texts(messages))
        problems = _check_turns(messages) | _check_texts(texts)
        if template is not None and (unread := _unread(messages, values.get("tools"), template)):
            problems["unread"] = unread
        return Checked(problems, texts)
    texts = kind.texts_of(values)
    problems = _check_texts(texts)
    if kind.name == "tags" and "" in texts:
        problems["empty_word"] = f"token {texts.index('') + 1} of {len(texts)} is empty"
    elif kind.name == "question":
        problems |= _check_answers(values["context"], values["answers"], values["answer_start"])
    return Checked(problems, texts)


def is_sound(text: str | None) -> bool:
    """Whether a text is certainly without any problem: short, printable ASCII, not blank. A cheap first test."""
    return (
        text is not None
        and bool(text)
        and len(text) < _LONG
        and text.isascii()
        and text.isprintable()
        and not text.isspace()
    )


def diagnose(record: Record, layout: Layout, *, typed: bool = True, template: Any = None) -> CheckedRecord:
    """Normalize a record to a canonical row and check it.

    Args:
        record: without a fault.
        layout: which column plays which role.
        typed: its source tells numbers from strings, as all formats but CSV do.
        template: of the tokenizer for conversations; None: unknown.
    """
    try:
        values = canonical(record, layout)
    except RowError as error:
        return CheckedRecord(None, {error.fault.code: error.fault.message})
    problems, texts = check_row(values, find_kind(layout.kind), template)
    if misspelt := _misspelt_column(record, layout):
        problems["misspelt_column"] = misspelt
    if typed and (number := _number_as_text(record, layout)):
        problems["wrong_type"] = number
    return CheckedRecord(values, problems, texts)


def special_tokens_in(texts: Sequence[str], special: Sequence[str]) -> str | None:
    """Return a message about a special token that a text spells out, if there is one."""
    found = next((token for token in special for text in texts if token in text), None)
    return f"{found} is in the text and will be read as the special token" if found else None


def _misspelt_column(record: Record, layout: Layout) -> str | None:
    """Return a message about a column that the record lacks, if it has one of a similar name."""
    values = record.values or {}
    for role, column in layout.columns.items():
        if column in values or "." in column:
            continue
        free = [name for name in values if name not in layout.columns.values()]
        if near := get_close_matches(column, free, 1, 0.7):
            return f"no {role}, but {near[0]!r}; is {column!r} meant?"
    return None


def _number_as_text(record: Record, layout: Layout) -> str | None:
    """Return a message about a label or tag that is a string where those of the other rows are numbers."""
    role = find_kind(layout.kind).labels
    if role is None or role not in layout.types or layout.types[role].base not in ("int", "float"):
        return None
    value = value_of(record.values or {}, layout.columns[role])
    text = next((one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one), None)
    return (
        text and f"column {layout.columns[role]!r} holds {text!r:.40}, a string, expected a number as in the other rows"
    )


def _check_texts(texts: Sequence[str]) -> Problems:
    problems: Problems = {}
    for text in texts:
        if is_sound(text):
            continue
        for kind, message in damages(text).items():
            problems.setdefault(kind, message)
        if len(text) >= _LONG and "repetitive" not in problems:
            begun = text[:_COMPRESSED].encode(errors="replace")
            if (left := len(zlib.compress(begun, 1)) / len(begun)) < _REPETITIVE:
                problems["repetitive"] = f"compressed, {100 * left:.1f} % of its size is left: {text[:30]!r}..."
    return problems


def _check_turns(messages: Sequence[Mapping[str, Any]]) -> Problems:
    problems: Problems = {}
    before = None
    for number, message in enumerate(messages, start=1):
        for kind, text in _check_turn(message, before).items():
            problems.setdefault(kind, f"message {number} {text}")
        before = message.get("role")
    if "role" not in problems and before != "assistant":
        problems["last_turn"] = f"message {len(messages)}, the last, is of the {before}: nothing after it is learned"
    if "role" in problems:
        problems.pop("turns", None)  # it follows from the unknown role
    return problems


def _unread(messages: Sequence[Mapping[str, Any]], tools: str | None, template: Any) -> str | None:
    """Return a message about a part of a conversation that a chat ``template`` does not read, if there is one."""
    found = next(iter(unread_members(template, messages)), None)
    if found is not None:
        return f"message {found[0]} has {found[1]!r}, which the template does not read"
    return "it has tools, which the template does not read" if tools and "tools" not in str(template) else None


def _check_turn(message: Mapping[str, Any], before: str | None) -> Problems:
    problems: Problems = {}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        problems["role"] = f"has role {role!r}, expected {', '.join(ROLES)}" + (f"; {hint}" if hint else "")
    elif role not in _FOLLOWS.get(before, ROLES):
        problems["turns"] = f"of the {role} " + (f"follows one of the {before}" if before else "is the first")
    if (is_learned := message.get("train")) is not None:
        code = "marked_turn" if is_learned else "unlearned_turn"
        problems[code] = f"of the {role} is marked {'to be' if is_learned else 'as not to be'} learned"
    calls = message.get("tool_calls")
    if content is None and not calls and (near := get_close_matches("content", message.keys() - {"content"}, 1, 0.7)):
        problems["misspelt_column"] = f"has {near[0]!r}; is 'content' meant?"
    elif not calls and (not content or (isinstance(content, str) and content.isspace())):
        problems["empty_turn"] = f"of the {role} is empty"
    return problems


def _check_answers(context: str, answers: Sequence[str], starts: Sequence[int]) -> Problems:
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
