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
from lorakeet.serve.http.tools.forms import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, MISTRAL_IDS, ToolForm, tool_form
from lorakeet.serve.http.tools.reader import ToolCallReader, joined

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
        (f"So: {TWO} and {TWO}. ", "So:  and . ", ["sum", "sum"]),
        ('<tool_call>{"arguments": {"a": "}"}, "name": "sum", "id": 1}</tool_call>', "", ["sum"]),
        (
            '<tool_call>{"name": "sum", "arguments": {}</tool_call> a bracket is missing',
            " a bracket is missing",
            ["sum"],
        ),
        ('<tool_call>{"name": "sum", "parameters": {"a": [{"b": "\\"]}"}]}, "id": {"a": {}}}</tool_call>', "", ["sum"]),
        ("<tool_call><tool_call>x", "<tool_call><tool_call>x", []),
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
        (MISTRAL, '[TOOL_CALLS][{"name": "sum", "arguments": {}}', "", ["sum"]),
        (MISTRAL, '[TOOL_CALLS][{"name": "sum"}, 3]', ", 3]", ["sum"]),
        (MISTRAL, "[TOOL_CALLS] [] nothing", "[TOOL_CALLS] [] nothing", []),
        (MISTRAL_ARGS, 'So: [TOOL_CALLS]look[ARGS]{"at": "["}[TOOL_CALLS]sum[ARGS]{}', "So: ", ["look", "sum"]),
        (MISTRAL_ARGS, '[TOOL_CALLS]look{"at": "a bird"}', "", ["look"]),
        (MISTRAL_ARGS, '[TOOL_CALLS][{"name": "look", "arguments": {}}]', "", ["look"]),
        (MISTRAL_ARGS, "[TOOL_CALLS]look, a bird", "[TOOL_CALLS]look, a bird", []),
        (MISTRAL_ARGS, "[TOOL_CALLS]look[ARGS]", "[TOOL_CALLS]look[ARGS]", []),
        (MISTRAL_IDS, '[TOOL_CALLS]look[CALL_ID]abcdefgh1[ARGS]{}[TOOL_CALLS]sum[CALL_ID]x[ARGS]{}', "", ["look", "sum"]),
        (MISTRAL, "[TOOL", "[TOOL", []),
        (LLAMA, LLAMA_CALL, "", ["look"]),
        (LLAMA, f"\n{LLAMA_CALL}; {LLAMA_CALL}\n", "", ["look", "look"]),
        (LLAMA, f"I look: {LLAMA_CALL}", f"I look: {LLAMA_CALL}", []),
        (LLAMA, f"{LLAMA_CALL} is what I do", " is what I do", ["look"]),
        (LLAMA, '{"parameters": {}, "name": "sum"}', "", ["sum"]),
        (LLAMA, '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),  # no function of this name
        (LLAMA, '{"colour": "red"}', '{"colour": "red"}', []),
        (LLAMA, "{" * 5000, "{" * 5000, []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_other_forms_in_pieces(form: ToolForm, text: str, said: str, names: list[str], size: int) -> None:
    check_pieces(form, text, said, names, size)


def check_pieces(form: ToolForm, text: str, said: str, names: list[str], size: int) -> None:
    reader = ToolCallReader(form, ["look", "sum"])
    deltas = [delta for start in range(0, len(text), size) for delta in reader.add(text[start : start + size])]
    passed, calls = joined(deltas + reader.end())
    assert passed == said and [call["function"]["name"] for call in calls] == names
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)


@pytest.mark.parametrize(
    ("form", "begin", "end"),
    [
        (HERMES, '<tool_call>\n{"name": "look", "arguments": ', "}\n</tool_call>"),
        (MISTRAL, '[TOOL_CALLS] [{"name": "look", "arguments": ', ', "id": "abcdefghi"}]'),
        (MISTRAL_ARGS, "[TOOL_CALLS]look[ARGS]", ""),
        (MISTRAL_IDS, "[TOOL_CALLS]look[CALL_ID]abcdefghi[ARGS]", ""),
        (LLAMA, '{"name": "look", "parameters": ', "}"),
    ],
)
def test_arguments_come_as_they_are_written(form: ToolForm, begin: str, end: str) -> None:
    """The first piece of a call has its name and id, and each further one what the model has written since."""
    reader, arguments = ToolCallReader(form, ["look"]), '{"at": "a \\"bird}\\"",  "n": [1, {}]}'
    assert reader.add(begin) == []
    first, *pieces = [delta["tool_calls"] for character in arguments for delta in reader.add(character)]
    assert [one.keys() for one in first] == [{"index", "id", "type", "function"}]
    assert first[0]["function"] == {"name": "look", "arguments": ""}
    assert first[0]["id"] == "abcdefghi" or form is not MISTRAL_IDS
    assert [one["function"]["arguments"] for [one] in pieces] == list(arguments)
    assert all(one.keys() == {"index", "function"} for [one] in pieces)
    assert reader.add(end) + reader.end() == [] and reader.finish("stop") == reader.finish("length") == "tool_calls"


@pytest.mark.parametrize(
    ("form", "text", "finish", "expected"),
    [
        (HERMES, '<tool_call>{"name": "look", "arguments": {"at": "a b', "length", "length"),
        (HERMES, '<tool_call>{"name": "look", "arguments": {"at": "a b', "stop", "stop"),
        (HERMES, '<tool_call>{"name": "look", "arguments": {"at": bird}}</tool_call>', "stop", "stop"),
        (HERMES, f"{TWO}{ONE[:20]}", "length", "length"),
        (HERMES, f"{TWO} and the", "length", "tool_calls"),
        (HERMES, "text", "length", "length"),
        (MISTRAL, '[TOOL_CALLS][{"name": "sum", "arguments": {}}', "length", "length"),
        (MISTRAL, '[TOOL_CALLS][{"name": "sum", "arguments": {}}', "stop", "tool_calls"),
        (LLAMA, f"{LLAMA_CALL}; {LLAMA_CALL[:30]}", "length", "length"),
    ],
)
def test_a_cut_call_is_not_told_as_whole(form: ToolForm, text: str, finish: str, expected: str) -> None:
    reader = ToolCallReader(form, ["look", "sum"])
    reader.add(text)
    reader.end()
    assert reader.finish(finish) == expected


#: Templates in the manner of Mistral's and Llama 3's.
OTHERS = {
    MISTRAL: "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for message in messages %}[INST] {{ message.content }}[/INST]{% endfor %}{# [TOOL_CALLS] #}",
    LLAMA: """{% if tools %}Respond in the format {"name": function name, "parameters": dictionary of argument name and """
    """its value}. {{ tools | tojson }}{% endif %}{% for message in messages %}<|start_header_id|>{{ message.role }}"""
    """<|end_header_id|>{{ message.content }}<|eot_id|>{% endfor %}""",
}
OTHERS[MISTRAL_ARGS] = OTHERS[MISTRAL] + "{# [ARGS] #}"
OTHERS[MISTRAL_IDS] = OTHERS[MISTRAL_ARGS] + "{# [CALL_ID] #}"


def test_the_template_states_the_form() -> None:
    forms = [tool_form(chat_tokenizer(template)) for template in (TEMPLATE, *OTHERS.values(), CHATML)]
    assert forms == [HERMES, *OTHERS, None]
    assert tool_form(chat_tokenizer(TEMPLATE + "<function=look>")) is None


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
        signs = [sign for sign in (form.opening, form.closing, *form.signs) if sign]
        tokenizer.add_special_tokens({"additional_special_tokens": signs})
        assert [*form.special_ids(tokenizer).values()] == sorted(signs)
    grammar = Grammars(tokenizer, [1]).for_calls(form, dict(enumerate(TOOLS)))
    for seed in range(6):
        text, [call] = drawn(form, tokenizer, grammar.copy(), seed)
        arguments = json.loads(call["function"]["arguments"])
        assert text == "" and call["function"]["name"] in ("look", "sum")
        if call["function"]["name"] == "look":
            assert arguments["at"] in ("a bird", 'a "tree"') and len(arguments) == 1


def drawn(form: ToolForm, tokenizer: Any, grammar: Any, seed: int, begin: str = "") -> tuple[str, list[dict[str, Any]]]:
    """Return text and calls of an answer that begins so, and goes on with random ones of the allowed tokens."""
    source, reader = np.random.default_rng(seed), ToolCallReader(form, ["look", "sum"])
    text, deltas = TextStream(tokenizer, [5], (), form.special_ids(tokenizer)), []
    first, count = tokenizer(begin, add_special_tokens=False)["input_ids"], 0
    while not grammar.is_complete() and count < 2000:
        allowed = grammar.allowed()
        token = first[count] if count < len(first) else int(source.choice(np.flatnonzero(allowed)))
        token = 1 if count > 200 and allowed[1] else token  # the end token
        assert allowed[token]
        if token == 1:
            break
        grammar.accept(token)
        deltas += reader.add(text.add(token))
        count += 1
    assert count < 2000
    return joined(deltas + reader.add(text.end()) + reader.end())


STRICT_BEGINS = {
    HERMES: 'I look: <tool_call>\n{"name": "look", "arguments": ',
    MISTRAL: 'I look: [TOOL_CALLS][{"name": "look", "arguments": ',
    MISTRAL_ARGS: "I look: [TOOL_CALLS]look[ARGS]",
    MISTRAL_IDS: "I look: [TOOL_CALLS]look[CALL_ID]abcdefgh1[ARGS]",
    LLAMA: '{"name": "look", "parameters": ',
}


@pytest.mark.parametrize("form", STRICT_BEGINS)
@pytest.mark.parametrize("has_special", [False, True])
def test_a_strict_call_among_text(form: ToolForm, has_special: bool) -> None:
    """Text is free; once a call of a strict function has begun, its arguments keep to the schema."""
    tokenizer: Any = chat_tokenizer(TEMPLATE)
    if has_special:
        signs = [sign for sign in (form.opening, form.closing, *form.signs) if sign]
        tokenizer.add_special_tokens({"additional_special_tokens": signs})
    grammar = Grammars(tokenizer, [1]).for_calls(form, dict(enumerate(TOOLS)), False)
    for seed in range(4):
        _, calls = drawn(form, tokenizer, grammar.copy(), seed, STRICT_BEGINS[form])
        assert calls[0]["function"]["name"] == "look"
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            assert call["function"]["name"] != "look" or (
                arguments["at"] in ("a bird", 'a "tree"') and len(arguments) == 1
            )
    own = grammar.copy()
    for token in tokenizer("Hi 5 < 6.", add_special_tokens=False)["input_ids"]:
        assert own.allowed()[token]
        own.accept(token)
    assert own.allowed()[1]  # the end token


@pytest.mark.parametrize("parameters", [{"type": "array"}, {"$ref": "http://x/y"}, {"x-guidance": {}}])
def test_parameters_that_cannot_be_kept_to(parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(ApiError, match="cannot be kept to") as caught:
        Grammars(chat_tokenizer(TEMPLATE), [1]).for_calls(HERMES, {3: tool})
    assert caught.value.param in ("tools.3.function.parameters", "tools")


@pytest.mark.parametrize(
    ("form", "choice"),
    [(HERMES, {"type": "function", "function": {"name": "look"}}), *((form, "required") for form in (HERMES, *OTHERS))],
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
    pieces = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        state.handle_chunk(chunk)
        pieces += [one for choice in chunk.choices for one in choice.delta.tool_calls or ()]
    streamed = state.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls" and not streamed.message.content
    assert [one.function.arguments for one in streamed.message.tool_calls] == [call.function.arguments]
    assert len(streamed.message.tool_calls[0].id) == len(call.id) == len(form.id_begin) + form.id_length
    assert [one.function.name for one in pieces] == ["look", *[None] * (len(pieces) - 1)]
    assert len(pieces) > 4 and all(one.function.arguments for one in pieces[1:])


def test_strict_tools_through_the_official_client(client: openai.OpenAI) -> None:
    """Text stays free, though in UTF-8 alone; a function whose schema cannot be kept to is refused by its field."""
    tool = {"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}
    asked: dict[str, Any] = {"model": "red", "messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    asked |= {"max_tokens": 12, "temperature": 0.0}
    plain = client.chat.completions.create(**{**asked, "tools": TOOLS[:1]}).choices[0]
    strict = client.chat.completions.create(**asked).choices[0]
    assert "\N{REPLACEMENT CHARACTER}" in plain.message.content  # a random model writes any bytes
    assert "\N{REPLACEMENT CHARACTER}" not in strict.message.content and strict.finish_reason == plain.finish_reason
    with pytest.raises(openai.BadRequestError, match="cannot be kept to"):
        wrong = {"type": "function", "function": {"name": "look", "strict": True, "parameters": {"$ref": "http://x/y"}}}
        client.chat.completions.create(**{**asked, "tools": [wrong]})
