"""Calls of tools are read out of an answer, whole or in pieces; other text passes as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.chat_templates import CHATML, chat_tokenizer
from helpers.http_server import TEMPLATE
from lorakeet.serve.http.tool_calls import ToolCallReader, reads_tool_calls

ONE = '<tool_call>\n{"name": "look", "arguments": {"at": "a bird"}}\n</tool_call>'
TWO = '<tool_call>{"name": "sum", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        (ONE, "", ["look"]),
        (f"{ONE}\n{TWO}", "", ["look", "sum"]),
        (f"I look. {ONE}", "I look. ", ["look"]),
        ("no call <tool", "no call <tool", []),
        ("a < b", "a < b", []),
        ("<tool_call>{not json}</tool_call>", "<tool_call>{not json}</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"name": "look"', '<tool_call>{"name": "look"', []),
        (f"{TWO}<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", ["sum"]),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_in_pieces(text: str, said: str, names: list[str], size: int) -> None:
    reader, passed = ToolCallReader(), ""
    for start in range(0, len(text), size):
        passed += reader.add(text[start : start + size])
    rest, calls = reader.end()
    assert passed + rest == said and [call["function"]["name"] for call in calls] == names
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)


def test_a_form_that_is_not_known() -> None:
    assert reads_tool_calls(chat_tokenizer(TEMPLATE)) and not reads_tool_calls(chat_tokenizer(CHATML))
    special: Any = chat_tokenizer(TEMPLATE)
    special.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})  # the text would lack it
    assert not reads_tool_calls(special)
