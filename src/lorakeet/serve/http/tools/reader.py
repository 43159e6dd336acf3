"""Reader of tool calls in an answer, piece by piece: text passes, and so do arguments as the model writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from lorakeet.serve.http.tools.forms import ARGS, CALL_ID, HERMES, LLAMA, MISTRAL, ToolForm
from lorakeet.serve.http.tools.json_extent import JsonExtent

#: A piece of an answer in OpenAI's form: ``content``, or ``tool_calls`` with one piece of one call.
Delta: TypeAlias = dict[str, Any]
#: A call in OpenAI's form.
Call: TypeAlias = dict[str, Any]


class _Signs(NamedTuple):
    """Signs around the calls of a form.

    Attributes:
        first: Pattern of what is before the first call; its group is not empty if a closing sign follows the last one.
        further: Pattern of what is between two calls; None: each has an opening of its own.
        closing: Text behind the last call; empty: none.
    """

    first: re.Pattern[str]
    further: re.Pattern[str] | None
    closing: str


#: Signs of each form, by its opening.
_SIGNS = {
    HERMES.opening: _Signs(re.compile(r"(<tool_call>)\s*"), None, HERMES.closing),
    MISTRAL.opening: _Signs(re.compile(r"\[TOOL_CALLS\]\s*(\[)?\s*"), re.compile(r"\s*,\s*"), "]"),
    LLAMA.opening: _Signs(re.compile(r"\s*()"), re.compile(r"[;\s]*"), ""),
}
#: Beginning of a call up to its arguments, as JSON and in Mistral's newer form.
_JSON_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.){0,256}")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_PLAIN_HEAD = re.compile(
    rf"(?P<name>[\w.-]{{1,64}})\s*(?:{re.escape(CALL_ID)}\s*(?P<id>\w{{1,64}})\s*)?(?:{re.escape(ARGS)}\s*)?(?=\{{)"
)
#: Text that may become a beginning in Mistral's newer form.
_PLAIN_PART = re.compile(r"[\w.\-\[\]\s]{0,256}")
#: Characters between the arguments of a call and its end at most, such as an id.
_LONGEST_TAIL = 1024
#: Characters between two calls.
_BETWEEN = ";, \n\t\r"


class ToolCallReader:
    """Reader of one answer."""

    def __init__(self, form: ToolForm, names: Collection[str] = ()) -> None:
        """Begin an answer.

        Args:
            form: Form of the calls.
            names: Names of the functions; JSON without signs around it is a call only with one of these.
        """
        self._form, self._names, self._signs = form, names, _SIGNS[form.opening]
        self._before, self._is_open = self._signs.first, False  # sign before a call, and whether one must close it
        self._held, self._is_last = "", False  # text that waits for more, and whether no more comes
        self._read: Callable[[], bool] = self._read_text  # of the part that comes next; whether it goes on
        self._extent, self._scanned = JsonExtent(), 0  # of an object, and how much of the held text it has read
        self._arguments: list[str] = []
        self._deltas: list[Delta] = []
        self._count, self._has_text, self._is_broken = 0, False, False
        self._is_behind, self._gap = False, ""  # whether a call came last, and white space since, shown if text follows

    def add(self, text: str) -> list[Delta]:
        """Return what is certain after a further piece of the answer."""
        self._held += text
        while self._read():
            pass
        made, self._deltas = self._deltas, []
        return made

    def end(self) -> list[Delta]:
        """Return the rest, once nothing follows; what is no call is text."""
        self._is_last = True
        made = self.add("")
        if self._read in (self._read_text, self._read_begin):
            self._say(self._held)
        if self._read == self._read_arguments:
            self._is_broken = True
        return [*made, *self._deltas]

    def finish(self, finish: str) -> str:
        """Return the reason for the end of the answer, which was ``finish`` for its text: whole calls are one."""
        is_cut = self._read == self._read_begin or (self._is_open and self._read != self._read_text)
        return "tool_calls" if self._count and not self._is_broken and not (is_cut and finish != "stop") else finish

    # -- parts of an answer: each reads what is held, and tells whether the next part can begin ----------------------

    def _read_text(self) -> bool:
        opening, held = self._form.opening, self._held
        if not opening:
            begins = not self._has_text and not self._count and held.lstrip()[:1] in ("", "{")
            at, is_found = (0, bool(held.strip())) if begins else (len(held), False)
        else:
            at = held.find(opening)
            if is_found := at >= 0:
                self._before = self._signs.first
            else:
                most = min(len(held), len(opening) - 1)
                at = len(held) - next((n for n in range(most, 0, -1) if opening.startswith(held[-n:])), 0)
        self._say(held[:at])
        self._held = held[at:]
        if is_found:
            self._extent, self._scanned, self._read = JsonExtent(), 0, self._read_begin
        return is_found

    def _read_begin(self) -> bool:
        before = self._before.match(self._held)
        assert before is not None
        at = before.end()
        if at == len(self._held):
            return False
        if before.re is self._signs.first:
            self._is_open = bool(before[1])
        is_plain = self._form.opening == MISTRAL.opening and not self._is_open
        head = (_PLAIN_HEAD if is_plain else _JSON_HEAD).match(self._held, at)
        if head is not None:
            name = head["name"] if is_plain else _parsed(head["name"])
            if not self._is_name(name):
                return self._give_up(head.end())
            self._begin_call(name, head["id"] if is_plain else None)
            self._held = self._held[head.end() :]
            self._extent, self._arguments, self._read = JsonExtent(), [], self._read_arguments
            return True
        if is_plain:
            may_begin = _PLAIN_PART.fullmatch(self._held, at) is not None and not self._is_last
            return self._give_up(at) if not may_begin else False
        return self._read_object(at) if self._held[at] == "{" else self._give_up(at)

    def _read_object(self, at: int) -> bool:
        """Read a call whose name does not come before its arguments, or which has none; it is sent once it is whole."""
        begin = max(at, self._scanned)
        end, self._scanned = self._extent.end(self._held[begin:]), len(self._held)
        if end is None:
            return False
        value = _parsed(self._held[at : begin + end])
        name, arguments = _name_and_arguments(value)
        if not self._is_name(name) or not isinstance(arguments, Mapping):
            return self._give_up(begin + end)
        self._begin_call(name)
        self._send_arguments(json.dumps(arguments, ensure_ascii=False))
        self._held, self._read = self._held[begin + end :], self._read_behind
        return True

    def _read_arguments(self) -> bool:
        if not self._held:
            return False
        end = self._extent.end(self._held)
        piece, self._held = self._held[:end], "" if end is None else self._held[end:]
        self._arguments.append(piece)
        self._send_arguments(piece)
        if end is not None:
            self._is_broken |= not isinstance(_parsed("".join(self._arguments)), Mapping)
            is_plain = self._form.opening == MISTRAL.opening and not self._is_open
            self._read = self._read_text if is_plain else self._read_tail
        return end is not None

    def _read_tail(self) -> bool:
        """Skip the rest of a call's object; its last bracket is missing if the closing sign comes first."""
        end = JsonExtent(1).end(self._held)
        if self._form.closing and (stop := self._held.find(self._form.closing)) >= 0:
            end = stop if end is None else min(end, stop)
        if end is None and len(self._held) < _LONGEST_TAIL:
            return False
        self._held, self._read = self._held[end or 0 :], self._read_behind
        return True

    def _read_behind(self) -> bool:
        closing, further, rest = self._signs.closing, self._signs.further, self._held.lstrip()
        if closing and rest.startswith(closing):
            self._held, self._is_open, self._read = rest[len(closing) :], False, self._read_text
            return True
        if not rest.strip(_BETWEEN) or closing.startswith(rest):
            return False
        found = further.match(self._held) if further is not None else None
        if found is not None and self._held[found.end() :][:1] == "{":
            self._before, self._extent, self._scanned, self._read = found.re, JsonExtent(), 0, self._read_begin
        else:
            self._is_open, self._read = False, self._read_text
        return True

    # -- what is sent -----------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if self._is_behind and not text.strip():
            self._gap += text
        elif text:
            self._deltas.append({"content": self._gap + text})
            self._is_behind, self._gap, self._has_text = False, "", True

    def _give_up(self, end: int) -> bool:
        """Pass the held text up to ``end`` on, since it is no call."""
        self._say(self._held[:end])
        self._held, self._is_open, self._read = self._held[end:], False, self._read_text
        return True

    def _is_name(self, name: Any) -> bool:
        return isinstance(name, str) and (bool(self._form.opening) or name in self._names)

    def _begin_call(self, name: str, own_id: str | None = None) -> None:
        head = {"id": own_id or self._form.new_id(), "type": "function", "function": {"name": name, "arguments": ""}}
        self._deltas.append({"tool_calls": [{"index": self._count, **head}]})
        self._count, self._is_behind, self._gap = self._count + 1, True, ""

    def _send_arguments(self, piece: str) -> None:
        self._deltas.append({"tool_calls": [{"index": self._count - 1, "function": {"arguments": piece}}]})


def joined(deltas: Sequence[Delta]) -> tuple[str, list[Call]]:
    """Return the text and the calls of a whole answer."""
    text, calls = "", []
    for delta in deltas:
        text += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                calls.append({**piece, "function": dict(piece["function"])})
                del calls[-1]["index"]
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return text, calls


def _parsed(text: str) -> Any:
    """Return the value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _name_and_arguments(value: Any) -> tuple[Any, Any]:
    """Return name and arguments of a call; None for what is not there."""
    if not isinstance(value, Mapping):
        return None, None
    return value.get("name"), value.get("arguments", value.get("parameters", {}))
