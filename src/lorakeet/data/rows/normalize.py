"""Records to rows: one function for each kind of data, from a record's values by role to the canonical columns.

:mod:`lorakeet.data.encode.kinds` says which kind has which columns.
"""

from __future__ import annotations

from typing import Any

from lorakeet.data.read.column_types import MISSING, ColumnType
from lorakeet.data.read.record import FaultError
from lorakeet.data.rows.conversations import alpaca, as_tools, conversation_of, in_two_parts, to_json
from lorakeet.data.rows.values import Values

Row = dict[str, Any]


def conversation(values: Values) -> Row:
    """Normalize a conversation in any of its forms (:mod:`lorakeet.data.rows.conversations`)."""
    given = 0
    if "prompt" in values:
        turns, given = in_two_parts(values)
    elif "instruction" in values:
        turns = alpaca(values)
    elif "conversations" in values:
        turns = conversation_of(values, "conversations")
    else:
        turns = conversation_of(values, "messages")
    text = values.whole(next(iter(values.columns)), to_json(turns)) if turns else None
    return {"messages": text, "tools": as_tools(values), "given": given}


def labelled_text(values: Values) -> Row:
    """Normalize a text, or a pair of texts, and its label."""
    row = {"text": values.text("text"), "label": _label(values)}
    return {**row, "text_pair": values.text("text_pair")} if "text_pair" in values else row


def _label(values: Values) -> Any:
    value, type = values.raw("label"), values.types.get("label", ColumnType("str"))
    if isinstance(value, str):
        value = value.strip()  # blanks around a name are never a part of it
    if value is None or value == "" or value != value or value in MISSING:
        return None
    if not type.is_list:
        return values.scalar("label", value, type.base)
    if not isinstance(value, list):
        raise values.wrong_type("label", value, "a list of labels")
    return [values.scalar("label", member, type.base or "str") for member in value]


def tagged_tokens(values: Values) -> Row:
    """Normalize a list of tokens with a tag for each."""
    tokens, tags = values.strings("tokens"), values.strings("tags")
    if tokens is None or tags is None:
        return {}
    if len(tokens) != len(tags):
        raise FaultError("tag_count", f"{len(tokens)} tokens but {len(tags)} tags, expected one for each")
    base = values.types["tags"].base if "tags" in values.types else ""
    return {
        "tokens": [values.scalar("tokens", token, "str") for token in tokens],
        "tags": [values.scalar("tags", tag, base or "str") for tag in tags],
    }


def translation(values: Values) -> Row:
    """Normalize a source text and its target; an instruction with its input is a source, its output the target."""
    if "instruction" in values:
        turns = alpaca(values)
        return {"source": turns[-2]["content"], "target": turns[-1]["content"]} if turns else {}
    return {"source": values.text("source"), "target": values.text("target")}


def question(values: Values) -> Row:
    """Normalize a question, its context and the answers in it, each with the character that it begins at.

    Raises:
        FaultError: a value has a wrong type, an answer is not in its context, or not each answer has a start.
    """
    row: Row = {"question": values.text("question"), "context": values.text("context")}
    answers, starts = _answers(values.raw("answers"))
    if answers is None or row["context"] is None:
        return row
    if not isinstance(answers, list):
        raise values.wrong_type("answers", answers, "answers")
    answers = [values.scalar("answers", answer, "str") for answer in answers]
    starts = starts if starts is not None else values.raw("answer_start")
    starts = [starts] if isinstance(starts, int) else starts
    if starts is None:
        starts = [row["context"].find(answer) for answer in answers]
        if -1 in starts:
            lost = f"holds {answers[starts.index(-1)]!r:.40}, which is not in its context"
            raise values.fault("answers", lost, code="answer_place")
    if not isinstance(starts, list) or len(starts) != len(answers):
        phrase = f"holds {len(answers)} answers, without one answer_start for each"
        raise values.fault("answers", phrase, code="answer_place")
    starts = [values.scalar("answers", start, "int") for start in starts]
    return {**row, "answers": answers, "answer_start": starts}


def _answers(value: Any) -> tuple[Any, Any]:
    """Return texts and starts of a dict of lists, a list of dicts, a list of texts or one text (empty: no answer)."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        return ([texts] if isinstance(texts, str) else texts), starts
    if isinstance(value, list) and value and all(isinstance(answer, dict) for answer in value):
        return [answer.get("text") for answer in value], [answer.get("answer_start") for answer in value]
    return (value if not isinstance(value, str) else [value] if value else []), None
