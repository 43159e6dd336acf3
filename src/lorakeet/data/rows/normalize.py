"""From a record as it was found to one row of its kind: the canonical columns, whatever the file calls them.

| kind        | columns                                                                                          |
|-------------|--------------------------------------------------------------------------------------------------|
| text        | text                                                                                             |
| completion  | prompt, completion                                                                               |
| messages    | messages (JSON), tools (JSON or null), given (the first so many messages are never learned)      |
| classes     | text, text_pair (only where there are pairs), label: string, int64, float64 or a list of them    |
| tags        | tokens, tags (strings or int64)                                                                  |
| pairs       | anchor, positive, negative (only where there are some)                                           |
| translation | source, target                                                                                   |
| question    | question, context, answers, answer_start (both empty: there is no answer)                        |

Every row has its ``place`` (``quotes.jsonl:12``) besides. A row with nothing in a column has null there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets

from lorakeet.data.read.column_types import held, reads_as
from lorakeet.data.read.record import Fault, Row
from lorakeet.data.rows.column_mapping import Kind, Layout
from lorakeet.data.rows.conversations import alpaca, as_messages, as_tools, in_two_parts, sharegpt, to_json
from lorakeet.errors import DataError

#: The columns of each kind, as above.
COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages", "tools", "given"),
    "classes": ("text", "text_pair", "label"),
    "tags": ("tokens", "tags"),
    "pairs": ("anchor", "positive", "negative"),
    "translation": ("source", "target"),
    "question": ("question", "context", "answers", "answer_start"),
}
_OPTIONAL = ("text_pair", "negative")


class RowError(DataError):
    """A row does not hold what its layout needs; ``fault`` says in a phrase what is wrong."""

    def __init__(self, row: Row, fault: str, hint: str | None = None) -> None:
        place = f", {row.unit} {row.place}" if row.place else ""
        super().__init__(f"{row.source}{place}: {fault}", hint)
        self.fault = fault


def canonical(row: Row, layout: Layout) -> dict[str, Any]:
    """The canonical columns of one row and its ``place``; null where nothing was given or the row has a fault.

    Raises:
        RowError: a value is not what its role needs.
    """
    empty: dict[str, Any] = dict.fromkeys(column_names(layout))
    if row.values is None:
        return {**empty, "place": row.where}
    try:
        made = _MAKERS[layout.kind](Values(row.values, layout))
    except Fault as fault:
        raise RowError(row, fault.phrase, fault.hint) from None
    return {**empty, **made, "place": row.where}


def column_names(layout: Layout) -> list[str]:
    """The canonical columns of a ``layout``, but for ``place``."""
    return [name for name in COLUMNS[layout.kind] if name not in _OPTIONAL or name in layout.columns]


def features(layout: Layout) -> datasets.Features:
    """The canonical columns of a ``layout`` and ``place``, with their types."""
    string, whole = datasets.Value("string"), datasets.Value("int64")
    others = {
        "given": whole,
        "label": _feature(layout.types.get("label", "str")),
        "tokens": datasets.List(string),
        "tags": datasets.List(_feature(_inner(layout, "tags"))),
        "answers": datasets.List(string),
        "answer_start": datasets.List(whole),
    }
    return datasets.Features({name: others.get(name, string) for name in [*column_names(layout), "place"]})


def _feature(kind: str) -> Any:
    if kind.startswith("list"):
        return datasets.List(_feature(kind[5:-1] or "str"))
    return datasets.Value({"int": "int64", "float": "float64"}.get(kind, "string"))


def _inner(layout: Layout, role: str) -> str:
    """Type of the members of the lists that ``role`` holds."""
    return "int" if layout.types.get(role) == "list[int]" else "str"


class Values:
    """The values of one record by role, each checked for its type."""

    def __init__(self, values: Mapping[str, Any], layout: Layout) -> None:
        self._values, self.layout = values, layout

    def __contains__(self, role: str) -> bool:
        return role in self.layout.columns

    def raw(self, role: str) -> Any:
        """The value as found; None if there is none."""
        column = self.layout.columns.get(role)
        return None if column is None else held(self._values, column)

    def text(self, role: str) -> str | None:
        """A whole string, or None."""
        value = self.raw(role)
        if value is not None and not isinstance(value, str):
            raise self.fault(role, f"holds {type(value).__name__}, expected a string")
        return None if value is None else self.whole(role, value)

    def whole(self, role: str, text: str) -> str:
        """``text``, unless it has half a character in it: JSON can write half of a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.fault(role, f"holds half a character, \\u{ord(text[error.start]):04x}") from None
        return text

    def fault(self, role: str, phrase: str, hint: str | None = None) -> Fault:
        """A fault in the column of ``role``."""
        return Fault(f"column {self.layout.columns[role]!r} {phrase}", hint)


def _text(values: Values) -> dict[str, Any]:
    return {"text": values.text("text")}


def _completion(values: Values) -> dict[str, Any]:
    return {"prompt": values.text("prompt"), "completion": values.text("completion")}


def _messages(values: Values) -> dict[str, Any]:
    given = 0
    if "prompt" in values:
        turns, given = in_two_parts(values)
    elif "instruction" in values:
        turns = alpaca(values)
    elif "conversations" in values:
        turns = sharegpt(values)
    else:
        turns = as_messages(values, "messages")
    text = values.whole(next(iter(values.layout.columns)), to_json(turns)) if turns else None
    return {"messages": text, "tools": as_tools(values), "given": given}


def _classes(values: Values) -> dict[str, Any]:
    made = {"text": values.text("text"), "label": _label(values)}
    return {**made, "text_pair": values.text("text_pair")} if "text_pair" in values else made


def _label(values: Values) -> Any:
    value, kind = values.raw("label"), values.layout.types.get("label", "str")
    if value is None or value == "" or value != value:  # the last is NaN: how some write that nothing is there
        return None
    if kind.startswith("list"):
        if not isinstance(value, list):
            raise values.fault("label", f"holds {type(value).__name__}, expected a list of labels")
        return [_scalar(values, "label", member, kind[5:-1] or "str") for member in value]
    return _scalar(values, "label", value, kind)


def _scalar(values: Values, role: str, value: Any, kind: str) -> Any:
    """``value`` as ``kind``: a whole number, a fraction or a string; a CSV file writes numbers as strings."""
    if kind == "str" and isinstance(value, str):
        return values.whole(role, value)
    number = float(value) if isinstance(value, str) and reads_as(value) in ("int", kind) else value
    in_range = isinstance(number, (int, float)) and abs(number) < 2**53
    if kind == "float" and in_range:
        return float(number)
    if kind == "int" and in_range and number == int(number):
        return int(number)
    expected = {"int": "a whole number", "float": "a number", "str": "a string"}.get(kind, kind)
    raise values.fault(role, f"holds {value!r:.40}, expected {expected} as in the other rows")


def _tags(values: Values) -> dict[str, Any]:
    tokens, tags = _listed(values, "tokens"), _listed(values, "tags")
    if tokens is None or tags is None:
        return {}
    if len(tokens) != len(tags):
        raise Fault(f"{len(tokens)} tokens but {len(tags)} tags, expected one for each")
    kind = _inner(values.layout, "tags")
    return {
        "tokens": [_scalar(values, "tokens", token, "str") for token in tokens],
        "tags": [_scalar(values, "tags", tag, kind) for tag in tags],
    }


def _listed(values: Values, role: str) -> list[Any] | None:
    """A list; a string is taken for words between blanks, as a CSV file would write them."""
    value = values.raw(role)
    if isinstance(value, str):
        return value.split() or None
    if value is not None and not isinstance(value, list):
        raise values.fault(role, f"holds {type(value).__name__}, expected a list")
    return value


def _pairs(values: Values) -> dict[str, Any]:
    return {role: values.text(role) for role in values.layout.columns}


def _translation(values: Values) -> dict[str, Any]:
    if "instruction" in values:
        turns = alpaca(values)
        return {"source": turns[-2]["content"], "target": turns[-1]["content"]} if turns else {}
    return {"source": values.text("source"), "target": values.text("target")}


def _question(values: Values) -> dict[str, Any]:
    made = {"question": values.text("question"), "context": values.text("context")}
    texts, starts = _answers(values.raw("answers"))
    if texts is None or made["context"] is None:
        return made
    if not isinstance(texts, list):
        raise values.fault("answers", f"holds {type(texts).__name__}, expected answers")
    texts = [_scalar(values, "answers", text, "str") for text in texts]
    starts = starts if starts is not None else values.raw("answer_start")
    starts = [starts] if isinstance(starts, int) else starts
    if starts is None:
        starts = [made["context"].find(text) for text in texts]
        if -1 in starts:
            raise values.fault("answers", f"holds {texts[starts.index(-1)]!r:.40}, which is not in its context")
    if not isinstance(starts, list) or len(starts) != len(texts):
        raise values.fault("answers", f"holds {len(texts)} answers, without one answer_start for each")
    starts = [_scalar(values, "answers", start, "int") for start in starts]
    return {**made, "answers": texts, "answer_start": starts}


def _answers(value: Any) -> tuple[Any, Any]:
    """Texts and starts: of a dict of lists, a list of dicts, a list of texts or one text (empty: no answer)."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        return ([texts] if isinstance(texts, str) else texts), starts
    if isinstance(value, list) and value and all(isinstance(answer, dict) for answer in value):
        return [answer.get("text") for answer in value], [answer.get("answer_start") for answer in value]
    return (value if not isinstance(value, str) else [value] if value else []), None


_MAKERS: Mapping[Kind, Callable[[Values], dict[str, Any]]] = {
    "text": _text,
    "completion": _completion,
    "messages": _messages,
    "classes": _classes,
    "tags": _tags,
    "pairs": _pairs,
    "translation": _translation,
    "question": _question,
}
