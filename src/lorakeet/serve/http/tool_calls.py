"""Calls of tools in the text of an answer, in the forms that chat templates state: of Hermes and Qwen, Mistral, and Llama 3.

Hermes   <tool_call>{"name": "f", "arguments": {…}}</tool_call>, any number of times, within text
Mistral  [TOOL_CALLS][{"name": "f", "arguments": {…}}, …], at the end
Llama 3  {"name": "f", "parameters": {…}}, as the whole answer; several are separated by semicolons
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

#: A call in OpenAI's form.
Call: TypeAlias = dict[str, Any]
#: Separators of Llama's calls.
_BETWEEN = "; \n\t"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ToolForm:
    """A form of tool calls.

    Attributes:
        opening: Text before a call; empty: a call is the whole answer.
        closing: Text behind a call; empty: it ends the answer.
        before: Text of a forced call before its JSON.
        after: Text of a forced call behind it.
        arguments: Key of the arguments.
        id_begin: Text that the id of a call begins with.
        id_length: Characters of an id behind that; templates of Mistral take ids of nine letters and digits alone.
    """

    opening: str
    closing: str
    before: str
    after: str
    arguments: str = "arguments"
    id_begin: str = "call_"
    id_length: int = 24

    def special_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        """Return the special tokens that belong to a call, by id; others are no part of a text."""
        specials = {self.opening, self.closing} & set(tokenizer.all_special_tokens)
        return {tokenizer.convert_tokens_to_ids(text): text for text in sorted(specials)}


HERMES = ToolForm("<tool_call>", "</tool_call>", "\n", "\n")
MISTRAL = ToolForm("[TOOL_CALLS]", "", "[", "]", id_begin="", id_length=9)
LLAMA = ToolForm("", "", "", "", "parameters")


def tool_form(tokenizer: PreTrainedTokenizerBase) -> ToolForm | None:
    """Return the form of calls that the chat template states; None if it lists no tools, or states another form."""
    template = str(tokenizer.chat_template or "")
    if "tools" not in template:
        return None
    if HERMES.opening in template:
        return HERMES
    if MISTRAL.opening in template:
        return None if "[ARGS]" in template else MISTRAL
    return LLAMA if '{"name":' in template and '"parameters":' in template else None


class ToolCallReader:
    """Reader of an answer, piece by piece: text passes through, and calls are kept for its end."""

    def __init__(self, form: ToolForm, names: Collection[str] = ()) -> None:
        """Begin an answer.

        Args:
            form: Form of the calls.
            names: Names of the functions; JSON without signs around it is a call only with one of these.
        """
        self._form, self._names = form, names
        self._held = ""  # text that is a call, or may be the beginning of one
        self._has_passed = False

    def add(self, text: str) -> str:
        """Return the text that is certainly no part of a call."""
        self._held += text
        place = self._place_of_call()
        passed, self._held = self._held[:place], self._held[place:]
        self._has_passed = self._has_passed or bool(passed)
        return passed

    def _place_of_call(self) -> int:
        """Return where a call begins, or may begin, in the text that is held."""
        opening, held = self._form.opening, self._held
        if not opening:
            begins = not self._has_passed and held.lstrip()[:1] in ("", "{")
            return 0 if begins else len(held)
        place = held.find(opening)
        if place >= 0:
            return place
        most = min(len(held), len(opening) - 1)
        return len(held) - next((n for n in range(most, 0, -1) if opening.startswith(held[-n:])), 0)

    def end(self) -> tuple[str, list[Call]]:
        """Return the rest of the text, and the calls; text with a call that is not whole is text."""
        rest, self._held = self._held, ""
        if self._form.closing:
            return self._end_between_signs(rest)
        values = _values(rest.removeprefix(self._form.opening))
        if self._form.opening:
            values = values[0] if len(values) == 1 and isinstance(values[0], list) else []
        calls = [call for value in values if (call := _call(value, self._form)) is not None]
        is_known = bool(self._form.opening) or all(call["function"]["name"] in self._names for call in calls)
        return ("", calls) if calls and len(calls) == len(values) and is_known else (rest, [])

    def _end_between_signs(self, rest: str) -> tuple[str, list[Call]]:
        opening, closing = self._form.opening, self._form.closing
        calls, between = [], []
        while (start := rest.find(opening)) >= 0 and (stop := rest.find(closing, start)) >= 0:
            values = _values(rest[start + len(opening) : stop])
            call = _call(values[0], self._form) if len(values) == 1 else None
            if call is None:
                break
            calls.append(call)
            between.append(rest[:start])
            rest = rest[stop + len(closing) :]
        text = "".join([*between, rest])
        return (text if text.strip() else "") if calls else text, calls


def _values(text: str) -> list[Any]:
    """Return the JSON values that a text consists of, separated by semicolons or white space; none for any other text."""
    values, at = [], 0
    try:
        while text := text[at:].strip(_BETWEEN):
            value, at = _DECODER.raw_decode(text)
            values.append(value)
    except (ValueError, RecursionError):
        return []
    return values


def _call(value: Any, form: ToolForm) -> Call | None:
    """Return a call in OpenAI's form; None if the value is none."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    other = "parameters" if form.arguments == "arguments" else "arguments"
    arguments = value.get(form.arguments, value.get(other, {}))
    if not isinstance(arguments, Mapping):
        return None
    called = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": form.id_begin + uuid.uuid4().hex[: form.id_length], "type": "function", "function": called}
