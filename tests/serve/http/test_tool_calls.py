"""Calls of tools are read out of an answer, whole or in pieces; other text passes as it is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from helpers.chat_templates import CHATML, chat_tokenizer
from helpers.http_server import TEMPLATE
from lorakeet.serve.engine.text import TextStream
from lorakeet.serve.http.access.gate import Gate
from lorakeet.serve.http.errors import ApiError
from lorakeet.serve.http.grammar import Grammars
from lorakeet.serve.http.tool_calls import HERMES, LLAMA, MISTRAL, ToolCallReader, ToolForm, tool_form

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
    check_pieces(HERMES, text, said, names, size)


LLAMA_CALL = '{"name": "look", "parameters": {"at": "a; \\"bird\\""}}'


@pytest.mark.parametrize(
    ("form", "text", "said", "names"),
    [
        (MISTRAL, '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "]"}}]', "", ["look"]),
        (MISTRAL, 'So: [TOOL_CALLS][{"name": "sum", "arguments": {}, "id": "a"}, {"name": "look"}]', "So: ", ["sum", "look"]),
        (MISTRAL, '[TOOL_CALLS][{"name": "sum", "arguments": {}}', '[TOOL_CALLS][{"name": "sum", "arguments": {}}', []),
        (MISTRAL, '[TOOL_CALLS][{"name": "sum"}, 3]', '[TOOL_CALLS][{"name": "sum"}, 3]', []),
        (MISTRAL, "[TOOL", "[TOOL", []),
        (LLAMA, LLAMA_CALL, "", ["look"]),
        (LLAMA, f"\n{LLAMA_CALL}; {LLAMA_CALL}\n", "", ["look", "look"]),
        (LLAMA, f"I look: {LLAMA_CALL}", f"I look: {LLAMA_CALL}", []),
        (LLAMA, '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),  # no function of this name
        (LLAMA, '{"colour": "red"}', '{"colour": "red"}', []),
        (LLAMA, "{" * 5000, "{" * 5000, []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_other_forms_in_pieces(form: ToolForm, text: str, said: str, names: list[str], size: int) -> None:
    check_pieces(form, text, said, names, size)


def check_pieces(form: ToolForm, text: str, said: str, names: list[str], size: int) -> None:
    reader, passed = ToolCallReader(form, ["look", "sum"]), ""
    for start in range(0, len(text), size):
        passed += reader.add(text[start : start + size])
    rest, calls = reader.end()
    assert passed + rest == said and [call["function"]["name"] for call in calls] == names
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)


#: Templates in the manner of Mistral's and Llama 3's.
OTHERS = {
    MISTRAL: "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for message in messages %}[INST] {{ message.content }}[/INST]{% endfor %}{# [TOOL_CALLS] #}",
    LLAMA: """{% if tools %}Respond in the format {"name": function name, "parameters": dictionary of argument name and """
    """its value}. {{ tools | tojson }}{% endif %}{% for message in messages %}<|start_header_id|>{{ message.role }}"""
    """<|end_header_id|>{{ message.content }}<|eot_id|>{% endfor %}""",
}


def test_the_template_states_the_form() -> None:
    forms = [tool_form(chat_tokenizer(template)) for template in (TEMPLATE, *OTHERS.values(), CHATML)]
    assert forms == [HERMES, *OTHERS, None]
    assert tool_form(chat_tokenizer(OTHERS[MISTRAL] + "[ARGS]")) is None


AT = {"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "required": ["at"]}
AT |= {"additionalProperties": False, "$defs": {"place": {"enum": ["a bird", 'a "tree"']}}}
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "look at something", "parameters": AT}},
    {"type": "function", "function": {"name": "sum", "parameters": {"properties": {"n": {"type": "integer"}}}}},
]


@pytest.mark.parametrize("form", [HERMES, *OTHERS])
@pytest.mark.parametrize("has_special", [False, True])
def test_a_forced_call(form: ToolForm, has_special: bool) -> None:
    """Whatever tokens are drawn, special ones among them, the answer is one call that keeps to its schema."""
    tokenizer: Any = chat_tokenizer(TEMPLATE)
    if has_special:
        signs = [sign for sign in (form.opening, form.closing) if sign]
        tokenizer.add_special_tokens({"additional_special_tokens": signs})
        assert [*form.special_ids(tokenizer).values()] == sorted(signs)
    grammar = Grammars(tokenizer, [1]).for_call(form, dict(enumerate(TOOLS)))
    for seed in range(6):
        source, own = np.random.default_rng(seed), grammar.copy()
        text, reader = (
            TextStream(tokenizer, [5], (), form.special_ids(tokenizer)),
            ToolCallReader(form, ["look", "sum"]),
        )
        said, count = "", 0
        while not own.is_complete():
            token, count = int(source.choice(np.flatnonzero(own.allowed()))), count + 1
            own.accept(token)
            said += reader.add(text.add(token))
            assert count < 2000
        said += reader.add(text.end())
        rest, [call] = reader.end()
        arguments = json.loads(call["function"]["arguments"])
        assert said + rest == "" and call["function"]["name"] in ("look", "sum")
        if call["function"]["name"] == "look":
            assert arguments["at"] in ("a bird", 'a "tree"') and len(arguments) == 1


@pytest.mark.parametrize("parameters", [{"type": "array"}, {"$ref": "http://x/y"}, {"x-guidance": {}}])
def test_parameters_that_cannot_be_kept_to(parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(ApiError, match="cannot be kept to") as caught:
        Grammars(chat_tokenizer(TEMPLATE), [1]).for_call(HERMES, {3: tool})
    assert caught.value.param in ("tools.3.function.parameters", "tools")


@pytest.mark.parametrize("form", [HERMES, *OTHERS])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "look"}}], ids=["any", "named"]
)
def test_the_official_client_gets_the_call(
    form: ToolForm, choice: Any, app: Gate, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form in OTHERS:
        monkeypatch.setattr(app.app.state.service.tokenizer, "chat_template", OTHERS[form])  # type: ignore[attr-defined]
    schema = {"properties": {"at": {"enum": ["a bird", 'a "tree"']}}, "required": ["at"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    asked: dict[str, Any] = {"model": "red", "messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    asked |= {"tool_choice": choice, "max_tokens": 100, "temperature": 1.0, "seed": 3}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    [call] = whole.message.tool_calls
    assert call.function.name == "look" and json.loads(call.function.arguments)["at"] in ("a bird", 'a "tree"')
    state: Any = ChatCompletionStreamState(input_tools=openai.omit, response_format=openai.omit)
    for chunk in client.chat.completions.create(**asked, stream=True):
        state.handle_chunk(chunk)
    streamed = state.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls" and not streamed.message.content
    assert [one.function.arguments for one in streamed.message.tool_calls] == [call.function.arguments]
    assert len(streamed.message.tool_calls[0].id) == len(call.id) == len(form.id_begin) + form.id_length
