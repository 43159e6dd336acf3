"""Grammars of answers with tool calls, in llguidance's form of Lark: one call that must come, or text with calls in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorakeet.serve.http.tools.forms import CALL_ID, HERMES, MISTRAL, ToolForm

#: Text before a call and between calls; as the last part of an answer it goes on until the end token.
_TEXT = "TEXT: /(.|\\n)*/"
#: Text of an answer that is no call, in a form whose calls are the whole answer: it begins with no bracket.
_TEXT_WITHOUT_CALL = "TEXT: /[ \\t\\r\\n]*([^{ \\t\\r\\n](.|\\n)*)?/"
#: An id of Mistral.
_ID = "/[a-zA-Z0-9]{9}/"


def call_grammar(
    form: ToolForm, schemas: Sequence[tuple[str, Mapping[str, Any]]], specials: Mapping[str, int], *, is_forced: bool
) -> str:
    """Return the grammar of an answer.

    Args:
        form: Form of the calls.
        schemas: Name of each function, and the schema of its arguments with llguidance's options.
        specials: Ids of the signs of the form that are special tokens, by their text.
        is_forced: Whether the answer is one call and nothing else.
    """
    choices = [_choice(form, name, number, specials) for number, (name, _) in enumerate(schemas)]
    rules = [f"arguments{number}: %json {json.dumps(schema)}" for number, (_, schema) in enumerate(schemas)]
    rules.append(f"call: {' | '.join(choices)}")
    begin, end = (_signs((form.opening, form.before), specials), _signs((form.after, form.closing), specials))
    if is_forced:
        return "\n".join([f"start: {begin} call {end}", *rules])
    return "\n".join([*_free(form, begin, end, specials), *rules])


def _choice(form: ToolForm, name: str, number: int, specials: Mapping[str, int]) -> str:
    """Return a call of one function, from its name to its arguments."""
    if form.signs:
        between = [
            f"{_sign(sign, specials)} {_ID}" if sign == CALL_ID else _sign(sign, specials) for sign in form.signs
        ]
        return f"{json.dumps(name)} {' '.join(between)} arguments{number}"
    begin = f'{{"name": {json.dumps(name)}, {json.dumps(form.arguments)}: '
    return f'{json.dumps(begin)} arguments{number} "}}"'


def _free(form: ToolForm, begin: str, end: str, specials: Mapping[str, int]) -> list[str]:
    """Return the rules of an answer that may be text, calls, or both."""
    more = '(", " call)*' if form.opening else '("; " call)*'
    if not form.opening:
        return [f"start: call {more} | TEXT", _TEXT_WITHOUT_CALL]
    sign = _sign(form.opening, specials)
    opened = begin.removeprefix(sign)
    rules = [_TEXT, f"opening: TEXT {sign}" if form.opening in specials else f"opening[lazy]: TEXT {sign}"]
    if form.opening == HERMES.opening:
        return [f"start: (opening {opened} call {end})* TEXT", *rules]
    if form.before == MISTRAL.before:
        return [f"start: opening {opened} call {more} {end} | TEXT", *rules]
    return [f"start: opening call ({sign} call)* | TEXT", *rules]


def _signs(texts: Sequence[str], specials: Mapping[str, int]) -> str:
    return " ".join(_sign(text, specials) for text in texts if text)


def _sign(text: str, specials: Mapping[str, int]) -> str:
    return f"<[{specials[text]}]>" if text in specials else json.dumps(text)
