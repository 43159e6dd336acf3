"""Conversations in the usual forms, made one: a list of ``{"role": …, "content": …}``.

| form         | a row                                                                  |
|--------------|------------------------------------------------------------------------|
| messages     | a list of messages, or its JSON                                        |
| sharegpt     | ``conversations``: a list of ``{"from": "human", "value": …}``         |
| alpaca       | ``instruction``, perhaps ``input``, and ``output``: two turns          |
| in two parts | ``prompt`` and ``completion``, each a list of messages, or one's text  |

Roles and the order of turns are not checked here; the chat template raises an error if it does not accept them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets

from lorakeet.data.rows.values import Values

Message = dict[str, Any]

#: Conversations that are read for their system turn.
_LOOKED_AT = 1000
#: Role of each speaker of sharegpt.
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


def to_json(value: Any) -> str:
    """Return ``value`` as JSON that keeps letters outside of ASCII."""
    return json.dumps(value, ensure_ascii=False, default=str)


def message_texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the texts of ``messages``."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


def system_turn_notes(rows: datasets.Dataset | None) -> dict[str, Any]:
    """Return the system turn that conversations begin with, for the notes of an adapter that learns from them.

    Args:
        rows: Rows with ``messages``, of which the first :data:`_LOOKED_AT` are read; None: unknown.

    Returns:
        ``system``: the most common system turn if most conversations begin with it, else None; ``share``: of the
        conversations, those that begin with any.
    """
    conversations = [] if rows is None else rows.select(range(min(len(rows), _LOOKED_AT)))["messages"][:]
    firsts = [(json.loads(text) or [{}])[0] for text in conversations]
    contents = [first["content"] for first in firsts if first.get("role") == "system"]
    found = Counter(content for content in contents if isinstance(content, str))
    most = [content for content, count in found.most_common(1) if count * 2 > len(firsts)]
    return {"system": next(iter(most), None), "share": len(contents) / len(firsts) if firsts else 0.0}


def as_messages(values: Values, role: str, speaker: str | None = None) -> list[Message] | None:
    """Return the messages in the column of ``role``; None if it is empty. A plain string is one message of ``speaker``.

    Raises:
        FaultError: it holds something else.
    """
    value = values.raw(role)
    if isinstance(value, str):
        if not value.strip():
            return None
        if speaker is not None:
            return [{"role": speaker, "content": value}]
        value = _parsed(values, role, value)
    if value is not None and not isinstance(value, list):
        raise values.wrong_type(role, value, "a list of messages")
    return [_message(values, role, number, turn) for number, turn in enumerate(value or [], start=1)] or None


def sharegpt(values: Values) -> list[Message] | None:
    """Return the messages of ``conversations``, after the ``system`` text if there is one."""
    turns = as_messages(values, "conversations")
    return [*_system(values), *turns] if turns else None


def alpaca(values: Values) -> list[Message] | None:
    """Return two turns: instruction, blank line and input of the user, output of the assistant; None if one is missing."""
    instruction, output = values.text("instruction"), values.text("output")
    if instruction is None or output is None:
        return None
    asked = "\n\n".join(part for part in (instruction, values.text("input")) if part and not part.isspace())
    return [*_system(values), {"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def in_two_parts(values: Values) -> tuple[list[Message] | None, int]:
    """Return the messages of ``prompt`` and ``completion``, and the number of the prompt's; None if one is empty."""
    prompt, completion = as_messages(values, "prompt", "user"), as_messages(values, "completion", "assistant")
    return (prompt + completion, len(prompt)) if prompt and completion else (None, 0)


def as_tools(values: Values) -> str | None:
    """Return the tools that a conversation may call, as JSON; None if there are none."""
    tools = values.raw("tools")
    if isinstance(tools, str):
        tools = _parsed(values, "tools", tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise values.wrong_type("tools", tools, "a list of tools")
    return to_json(_without_null(tools)) if tools else None


def _system(values: Values) -> list[Message]:
    text = values.text("system")
    return [{"role": "system", "content": text}] if text and not text.isspace() else []


def _parsed(values: Values, role: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise values.fault(role, f"holds a string that is not JSON: {error}") from None


def _message(values: Values, role: str, number: int, turn: Any) -> Message:
    """Return one message with our member names, its content in one text, and without null members."""
    if not isinstance(turn, dict):
        raise values.fault(role, f"holds {type(turn).__name__} as message {number}, expected an object")
    message = _without_null(turn)
    if "from" in message and "role" not in message:
        speaker = str(message.pop("from")).lower()
        message = {"role": SPEAKERS.get(speaker, speaker), "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise values.fault(role, f"has no role in message {number}", 'a message is {"role": "user", "content": "…"}')
    content = message.setdefault("content", None)
    if isinstance(content, list):
        content = message["content"] = _joined(content)
    if content is not None and not isinstance(content, str):
        raise values.fault(role, f"has {type(content).__name__} as content of message {number}, expected text")
    return message


def _joined(parts: list[Any]) -> Any:
    """Join the texts of a content in parts (``{"type": "text", "text": …}``); return it as it is if a part is no text."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    whole = [text for text in texts if isinstance(text, str)]
    return "".join(whole) if len(whole) == len(parts) else parts


def _without_null(value: Any) -> Any:
    """Return ``value`` without null members: a table gives every object the members of all."""
    if isinstance(value, dict):
        return {name: _without_null(inner) for name, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value
