"""Messages as chat templates take them: calls of tools with their arguments as objects, no mark, no missing content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

#: Members of a message that every template reads, that say whether it is learned, or that are about it and not in it.
_KNOWN_MEMBERS = frozenset(("role", "content", "train", "id", "message_id", "index", "timestamp", "created_at", "date"))

Message = Mapping[str, Any]


class _Arguments(dict[str, Any]):
    """Arguments of a tool call: an object to a template that renders one, and its JSON to one that expects a string."""

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def parse_object(value: Any) -> dict[str, Any] | None:
    """Return an object that is given as it is, as JSON or as JSON of JSON, or empty; None for anything else."""
    for _ in range(3):
        if not isinstance(value, str):
            break
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def plain_message(message: Message) -> dict[str, Any]:
    """Return a message as templates take it: without mark and missing content, the arguments of its calls as objects."""
    plain = {name: value for name, value in message.items() if name != "train" and (name, value) != ("content", None)}
    if isinstance(calls := plain.get("tool_calls"), Sequence):
        plain["tool_calls"] = [_plain_call(call) if isinstance(call, Mapping) else call for call in calls]
    return plain


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(call)
    if isinstance(plain.get("function"), Mapping):
        plain["function"] = _plain_call(plain["function"])
    given = plain.get("arguments")
    if (parsed := parse_object(given)) is not None:
        text = given if isinstance(given, str) and given.lstrip()[:1] == "{" else json.dumps(parsed, ensure_ascii=False)
        plain["arguments"] = _Arguments(parsed, text)
    return plain


def unread_members(template: Any, messages: Sequence[Message]) -> list[tuple[int, str]]:
    """Return number and name of the members of messages that a chat ``template`` does not read."""
    text = template if isinstance(template, str) else json.dumps(template)
    return [
        (number, name)
        for number, message in enumerate(messages, start=1)
        for name, value in message.items()
        if name not in _KNOWN_MEMBERS and value not in ("", [], {}) and name not in text
    ]
