"""Conversations in the usual forms, made one: a list of ``{"role": …, "content": …}``.

| form         | a row                                                                  |
|--------------|------------------------------------------------------------------------|
| messages     | a list of messages, or its JSON; perhaps ``system``, a text before it   |
| sharegpt     | ``conversations``: a list of ``{"from": "human", "value": …}``         |
| alpaca       | ``instruction``, perhaps ``input``, and ``output``: two turns          |
| in two parts | ``prompt`` and ``completion``, each a list of messages, or one's text  |

Roles and the order of turns are not checked here; the chat template raises an error if it does not accept them.

A turn that is marked as not to be learned (:data:`MARKS`, in the forms of OpenAI, Axolotl, ms-swift, torchtune and others)
has the member ``train: false`` afterwards. A mark that may mean either, or parts of a turn, is a fault.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets

from lorakeet.chat.messages import parse_object
from lorakeet.data.read.record import FaultError
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
#: Member of a message that says whether its turn is learned -> whether a true value says so.
MARKS = {
    **dict.fromkeys(("train", "weight", "loss", "loss_weight", "loss_mask", "loss_scale", "learn", "trainable"), True),
    **dict.fromkeys(("training", "calculate_loss", "compute_loss", "need_loss", "train_on_turn", "in_loss"), True),
    **dict.fromkeys(("masked", "no_loss", "ignore_loss", "skip_loss"), False),
}
#: Members that may mean either, or mark a part of a turn.
_UNCLEAR_MARKS = ("mask", "train_on_input", "train_on_inputs", "train_detail", "training_detail")
_HOW_TO_MARK = "mark a turn that is not to be learned with train: false, or weight: 0"
#: Types of parts of a content that are text.
_TEXT_PARTS = (None, "text", "input_text", "output_text")


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


def conversation_of(values: Values, role: str) -> list[Message] | None:
    """Return the messages in the column of ``role``, after the ``system`` text if there is one."""
    turns = as_messages(values, role)
    return _with_system(values, turns) if turns else None


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
    if not prompt or not completion:
        return None, 0
    prompt = _with_system(values, prompt)
    return prompt + completion, len(prompt)


def as_tools(values: Values) -> str | None:
    """Return the tools that a conversation may call, as JSON; None if there are none."""
    tools = values.raw("tools")
    if isinstance(tools, str):
        tools = _parsed(values, "tools", tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise values.wrong_type("tools", tools, "a list of tools")
    return to_json([_unwrapped_tool(values, tool) for tool in tools]) if tools else None


def _with_system(values: Values, turns: list[Message]) -> list[Message]:
    system = _system(values)
    if system and turns[0]["role"] == "system":
        raise values.fault("system", "holds a text, and the first message is a system turn too", "keep one of the two")
    return [*system, *turns]


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
    message = {name: member for name, member in turn.items() if member is not None and member == member}
    if "from" in message and "role" not in message:
        speaker = str(message.pop("from")).lower()
        message = {"role": SPEAKERS.get(speaker, speaker), "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise values.fault(role, f"has no role in message {number}", 'a message is {"role": "user", "content": "…"}')
    place = _Place(values, role, f"message {number}")
    content = message.pop("content", None)
    if isinstance(content, list):
        content = _joined(content, place)
    if content is not None and not isinstance(content, str):
        raise place.fault(f"has {type(content).__name__} as content of {place.name}, expected text")
    said = {"role": message.pop("role"), **({} if content is None else {"content": content})}
    return _marked({**said, **_with_calls(message, place)}, place)


class _Place(NamedTuple):
    """Message of a conversation, for faults."""

    values: Values
    role: str
    name: str

    def fault(self, phrase: str, hint: str | None = None) -> FaultError:
        """Return the error for a fault in the message."""
        return self.values.fault(self.role, phrase, hint)


def _marked(message: Message, place: _Place) -> Message:
    """Return ``message`` with ``train: false`` in place of all marks, where one says that it is not learned."""
    if unclear := next((name for name in _UNCLEAR_MARKS if name in message), None):
        raise place.fault(f"has {unclear!r} in {place.name}, which may mean either or only a part of it", _HOW_TO_MARK)
    said = {name: _flag(name, message.pop(name), place) for name in MARKS if name in message}
    is_learned = message["role"] == "assistant"
    if said and all(said.values()) != is_learned:
        message["train"] = not is_learned
    return message


def _flag(name: str, value: Any, place: _Place) -> bool:
    """Return whether the mark ``name`` says that a turn is learned."""
    plain = {"true": 1, "false": 0, "1": 1, "0": 0}.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(plain, (bool, int, float)) or plain not in (0, 1):
        raise place.fault(f"has {name} {value!r:.40} in {place.name}, expected 0 or 1", _HOW_TO_MARK)
    return bool(plain) == MARKS[name]


def _with_calls(message: Message, place: _Place) -> Message:
    """Return the other members of a message, its calls of tools as a list of objects."""
    if "function_call" in message and "tool_calls" not in message:  # OpenAI's older form
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = _parsed(place.values, place.role, calls) if calls.strip() else []
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise place.fault(f"has tool_calls in {place.name} that are no list of objects")
        message["tool_calls"] = [_call(call, place) for call in calls]
    if calls == []:
        del message["tool_calls"]
    return message


def _call(call: Message, place: _Place) -> Message:
    """Return a call of a tool without null members, its arguments as they are; these must be an object, or its JSON."""
    call = {name: member for name, member in call.items() if member is not None}
    function = call.get("function")
    if isinstance(function, dict):
        call["function"] = {name: member for name, member in function.items() if member is not None}
    for holder in (call, call.get("function")):
        if isinstance(holder, dict) and "arguments" in holder and parse_object(holder["arguments"]) is None:
            raise place.fault(
                f"has arguments of a tool call in {place.name} that are no JSON object: {holder['arguments']!r:.40}",
                'write them as an object or its JSON: {"city": "Hanoi"}',
            )
    return call


def _unwrapped_tool(values: Values, tool: Any) -> Any:
    """Return a tool as an object, and its parameters too, where one of them is a string of JSON."""
    tool = _parsed(values, "tools", tool) if isinstance(tool, str) else tool
    if not isinstance(tool, dict):
        raise values.fault("tools", f"holds {type(tool).__name__}, expected objects")
    inner = tool.get("function")
    if isinstance(inner, dict):
        return {**tool, "function": _unwrapped_tool(values, inner)}
    if isinstance(tool.get("parameters"), str):
        return {**tool, "parameters": _parsed(values, "tools", tool["parameters"])}
    return tool


def _joined(parts: list[Any], place: _Place) -> str:
    """Return the texts of a content in parts (``{"type": "text", "text": …}``) as one."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            found = f"a part of type {kind!r}" if kind not in _TEXT_PARTS else f"{type(text).__name__} as a part"
            raise place.fault(f"has {found} in {place.name}, expected text alone", "leave out what is no text")
        texts.append(text)
    return "".join(texts)
