"""Calls of OpenAI's own client: each field is honoured, or refused by its name."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from helpers.http_server import BASE
from lorakeet.config import BaseSettings
from lorakeet.inference.generate import complete
from lorakeet.serve.http.access.gate import Gate

USER_TURN = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    given: dict[str, Any] = {"model": "red", "messages": USER_TURN, "max_tokens": 6, "temperature": 0.0, **fields}
    return client.chat.completions.create(**given)


def text(client: openai.OpenAI, **fields: Any) -> Any:
    given: dict[str, Any] = {"model": "red", "prompt": "hi", "max_tokens": 6, "temperature": 0.0, **fields}
    return client.completions.create(**given)


CHATS: dict[str, dict[str, Any]] = {
    "base": {"model": BASE},
    "another adapter": {"model": "blue"},
    "sampled": {"temperature": 1.0},
    "hot": {"temperature": 2.0},
    "seed": {"temperature": 1.0, "seed": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.5},
    "top_k": {"temperature": 1.0, "extra_body": {"top_k": 3}},
    "min_p": {"temperature": 1.0, "extra_body": {"min_p": 0.1}},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.5},
    "stop text": {"stop": "zq"},
    "stop list": {"stop": ["zq", "qz"]},
    "max_completion_tokens": {"max_tokens": openai.omit, "max_completion_tokens": 4},
    "no length": {"max_tokens": openai.omit, "stop": ["e", "a", "t"], "temperature": 1.0, "seed": 1},
    "nulls": {"user": None, "metadata": None, "stop": None, "seed": None},
    "neutral": {"store": False, "service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": True},
    "timeout of the body": {"extra_body": {"timeout": 30}},
    "system": {"messages": [{"role": "system", "content": "be brief"}, *USER_TURN]},
    "developer": {"messages": [{"role": "developer", "content": "be brief"}, *USER_TURN]},
    "history": {"messages": [*USER_TURN, {"role": "assistant", "content": "ho"}, *USER_TURN]},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    },
    "letters of all kinds": {"messages": [{"role": "user", "content": "Xin chào 🐦 \u0000 ع"}]},
    "tools": {"tools": TOOLS},
    "strict tool": {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
    "tools, not now": {"tools": TOOLS, "tool_choice": "none"},
    "result of a tool": {
        "messages": [
            *USER_TURN,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "a bird"},
        ],
        "tools": TOOLS,
        "tool_choice": "auto",
    },
    "format text": {"response_format": {"type": "text"}},
}

COMPLETIONS: dict[str, tuple[dict[str, Any], int]] = {  # fields, and the number of answers
    "text": ({}, 1),
    "texts": ({"prompt": ["hi", "ho", "hum"]}, 3),
    "ids": ({"prompt": [5, 6, 7]}, 1),
    "lists of ids": ({"prompt": [[5, 6], [7]]}, 2),
    "choices": ({"n": 2, "temperature": 1.0}, 2),
    "texts and choices": ({"prompt": ["hi", "ho"], "n": 2, "temperature": 1.0}, 4),
    "seed": ({"seed": 3, "temperature": 1.0}, 1),
    "stop": ({"stop": ["zq"]}, 1),
    "bias": ({"logit_bias": {"5": 1.5}}, 1),
    "penalties": ({"presence_penalty": 1, "frequency_penalty": 1}, 1),
    "echo not": ({"echo": False}, 1),
    "base": ({"model": BASE}, 1),
}

#: Fields -> error class, the field that it names, and a part of its message.
REFUSED: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str, str]] = {
    "model": ({"model": "rad"}, openai.NotFoundError, "model", "did you mean 'red'"),
    "no model": ({"model": ""}, openai.BadRequestError, "model", "at least 1 character"),
    "user": ({"user": "me"}, openai.BadRequestError, "user", "not honoured"),
    "metadata": ({"metadata": {"a": "b"}}, openai.BadRequestError, "metadata", "not honoured"),
    "store": ({"store": True}, openai.BadRequestError, "store", "False"),
    "effort": ({"reasoning_effort": "low"}, openai.BadRequestError, "reasoning_effort", "not honoured"),
    "functions": ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions", "not honoured"),
    "audio": ({"modalities": ["audio"]}, openai.BadRequestError, "modalities.0", "text"),
    "unknown": ({"extra_body": {"mirostat": 1}}, openai.BadRequestError, "mirostat", "not known"),
    "hot": ({"temperature": 2.1}, openai.BadRequestError, "temperature", "less than or equal to 2"),
    "temperature as text": ({"temperature": "1"}, openai.BadRequestError, "temperature", "number"),
    "top_p": ({"top_p": 0}, openai.BadRequestError, "top_p", "greater than 0"),
    "n": ({"n": 1000}, openai.BadRequestError, "n", "less than or equal to 16"),
    "n as bool": ({"n": True}, openai.BadRequestError, "n", "integer"),
    "length": ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "greater than or equal to 1"),
    "window": ({"max_tokens": 600}, openai.BadRequestError, "max_tokens", "together"),
    "two lengths": ({"max_completion_tokens": 3}, openai.BadRequestError, "body", "differ"),
    "stops": ({"stop": ["a"] * 17}, openai.BadRequestError, "stop", "at most 16"),
    "empty stop": ({"stop": [""]}, openai.BadRequestError, "stop.0", "at least 1"),
    "bias of a word": ({"logit_bias": {"bird": 1}}, openai.BadRequestError, "logit_bias", "'bird'"),
    "bias too large": ({"logit_bias": {"5": 101}}, openai.BadRequestError, "logit_bias.5", "100"),
    "bias of no token": ({"logit_bias": {"100000": 1}}, openai.BadRequestError, "logit_bias", "100000"),
    "top_logprobs alone": ({"top_logprobs": 2}, openai.BadRequestError, "body", "logprobs is not true"),
    "stream options alone": ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "body", "stream"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        openai.BadRequestError,
        "messages.0.content",
        "pictures",
    ),
    "role": ({"messages": [{"role": "root", "content": "hi"}]}, openai.BadRequestError, "messages.0.role", "system"),
    "no message": ({"messages": []}, openai.BadRequestError, "messages", "at least 1"),
    "no content": ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages.0", "no content"),
    "name of a message": (
        {"messages": [{"role": "user", "content": "hi", "name": "me"}]},
        openai.BadRequestError,
        "messages.0.name",
        "does not read",
    ),
    "result of no call": (
        {"messages": [*USER_TURN, {"role": "tool", "tool_call_id": "x", "content": "y"}]},
        openai.BadRequestError,
        "body",
        "tool_call_id",
    ),
    "forced tool": (
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        openai.BadRequestError,
        "tool_choice",
        "",
    ),
    "forced tool that is not there": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        openai.BadRequestError,
        "body",
        "not among the tools",
    ),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        openai.BadRequestError,
        "response_format.json_schema.schema",
        "not",
    ),
    "tools and schema": ({"tools": TOOLS, "response_format": JSON_FORMAT}, openai.BadRequestError, "body", "exclude"),
}


@pytest.mark.parametrize("fields", CHATS.values(), ids=CHATS)
def test_a_chat_is_answered(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    answer = chat(client, **fields)
    [choice] = answer.choices
    assert choice.finish_reason in ("stop", "length") and choice.message.role == "assistant"
    assert answer.usage.prompt_tokens > 0 and answer.usage.completion_tokens > 0


@pytest.mark.parametrize("fields", [CHATS["base"], CHATS["sampled"] | {"seed": 2}, CHATS["tools"]], ids=str)
def test_a_stream_has_the_text_of_the_whole_answer(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = chat(client, **fields)
    chunks = list(chat(client, **fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens and not chunks[-1].choices


@pytest.mark.parametrize(("fields", "count"), COMPLETIONS.values(), ids=COMPLETIONS)
def test_a_completion_is_answered(client: openai.OpenAI, fields: dict[str, Any], count: int) -> None:
    answer = text(client, **fields)
    assert [choice.index for choice in answer.choices] == list(range(count))
    streamed = [""] * count
    if "seed" in fields or fields.get("temperature", 0) == 0:
        for chunk in text(client, **fields, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == [choice.text for choice in answer.choices]


@pytest.mark.parametrize(("fields", "error", "param", "part"), REFUSED.values(), ids=REFUSED)
def test_a_field_that_is_not_honoured_is_named(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], param: str, part: str
) -> None:
    with pytest.raises(error) as caught:
        chat(client, **fields)
    body: Any = caught.value.body
    assert param in (body["param"], body["message"].partition(":")[0]) and part in body["message"], body
    assert set(body) == {"message", "type", "param", "code"} and not body["message"].endswith(".")


@pytest.mark.parametrize("field", ["best_of", "suffix", "echo"])
def test_fields_of_completions_are_refused_too(client: openai.OpenAI, field: str) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        text(client, **{field: {"best_of": 2, "suffix": "x", "echo": True}[field]})


# -- values -----------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_generate_alone(app: Gate, client: openai.OpenAI) -> None:
    from lorakeet.adapter.peft_model import PeftModel
    from lorakeet.base.load import load_base

    service = app.app.state.service
    folder = service.engine.residents.folder
    base = load_base(BaseSettings(model=str(folder.parent / "base"), dtype="fp32"))
    prompt = "A bird sings."
    [bare] = complete(base.model, base.tokenizer, [prompt], max_new_tokens=24, greedy=True)
    adapted = PeftModel.from_pretrained(base.model, str(folder / "red"))
    [red] = complete(adapted, base.tokenizer, [prompt], max_new_tokens=24, greedy=True)
    [turn] = complete(adapted, base.tokenizer, [USER_TURN], max_new_tokens=24, greedy=True)
    served = {model: text(client, model=model, prompt=prompt, max_tokens=24).choices[0].text for model in (BASE, "red")}
    assert served == {BASE: bare, "red": red} and bare != red
    assert chat(client, max_tokens=24).choices[0].message.content == turn


def test_a_seed_repeats_an_answer_and_choices_differ(client: openai.OpenAI) -> None:
    first, again = (text(client, seed=5, temperature=1.0, n=3, max_tokens=12).choices for _ in range(2))
    assert [one.text for one in first] == [one.text for one in again]
    assert len({one.text for one in first}) == 3
    assert text(client, seed=5, temperature=1.0, max_tokens=12).choices[0].text == first[0].text


def test_a_bias_decides_a_token_and_logprobs_tell_of_it(client: openai.OpenAI) -> None:
    token = 3 + 40
    answer = chat(client, logit_bias={str(token): 100}, logprobs=True, top_logprobs=2, max_tokens=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 3 and len({one.token for one in content}) == 1
    assert answer.choices[0].message.content == content[0].token * 3
    assert all(len(one.top_logprobs) == 2 and one.logprob < one.top_logprobs[0].logprob <= 0 for one in content)
    assert bytes(content[0].bytes).decode() == content[0].token
    older = text(client, logit_bias={str(token): 100}, logprobs=2, max_tokens=3).choices[0].logprobs
    assert older.tokens == [content[0].token] * 3 and older.text_offset == [0, 1, 2]
    assert all(len(likely) == 2 for likely in older.top_logprobs) and len(older.token_logprobs) == 3


def test_a_stop_text_ends_an_answer_before_it(client: openai.OpenAI) -> None:
    token = {str(3 + 40): 100}
    sign = chat(client, logit_bias=token, max_tokens=1).choices[0].message.content
    answer = chat(client, logit_bias=token, stop=sign * 3, max_tokens=9).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("", "stop")
    events = list(chat(client, logit_bias=token, stop=sign * 3, max_tokens=9, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == ""


def test_an_answer_keeps_to_its_schema(client: openai.OpenAI) -> None:
    answer = chat(client, response_format=JSON_FORMAT, temperature=1.0, n=4, max_tokens=64)
    values = [json.loads(choice.message.content) for choice in answer.choices]
    assert all(value["colour"] in ("red", "blue") and 0 <= value["count"] <= 9 and len(value) == 2 for value in values)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_prefix_is_found_again(client: openai.OpenAI) -> None:
    prompt = "The trouble with computers is that they do what you tell them, and not what you mean. " * 2
    before, after = (text(client, prompt=prompt, max_tokens=2).usage for _ in range(2))
    assert after.prompt_tokens_details.cached_tokens > before.prompt_tokens_details.cached_tokens
    other = text(client, model="blue", prompt=prompt, max_tokens=2).usage
    assert other.prompt_tokens_details.cached_tokens == 0


def test_models_have_their_base_as_parent(client: openai.OpenAI) -> None:
    models = {model.id: model.parent for model in client.models.list().data if model.id in (BASE, "red", "blue")}
    assert models == {BASE: None, "red": BASE, "blue": BASE}
    assert client.models.retrieve("red").parent == BASE
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such model")


def test_a_wrong_key_is_refused(url: str) -> None:
    with pytest.raises(openai.AuthenticationError, match="no valid key"):
        openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0).models.list()
