"""JSON schemas: answers keep to them, hostile ones are answered in less than a second, and none is passed over in part."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from starlette.testclient import TestClient

from helpers.http_server import tiny_app
from helpers.json_types import TYPES, check_text, schema_of
from helpers.tiny_base import byte_tokenizer
from lorakeet.config import BaseSettings
from lorakeet.serve.engine.requests import Request, Sampling
from lorakeet.serve.http import service as service_module
from lorakeet.serve.http.app import make_app
from lorakeet.serve.http.errors import ApiError
from lorakeet.serve.http.grammar import LONGEST_NUMBER, Grammars
from lorakeet.serve.http.start import Served, open_service


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_tokenizer(), [2])


def written(grammars: Grammars, schema: Any, seed: int = 0, most: int = 400) -> str:
    """Return an answer whose tokens are drawn at random from those that are allowed."""
    grammar, generator = grammars.for_schema(schema), torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not grammar.is_complete() and len(tokens) < most:
        allowed = torch.from_numpy(grammar.allowed()).nonzero().flatten()
        token = int(allowed[int(torch.randint(len(allowed), (1,), generator=generator))])
        if token == 2:
            break
        tokens.append(token)
        grammar.accept(token)
    text: str = byte_tokenizer().decode(tokens)
    return text


@pytest.mark.parametrize("name", TYPES)
def test_any_allowed_text_is_valid(grammars: Grammars, name: str) -> None:
    for seed in range(4):
        check_text(name, written(grammars, schema_of(name), seed))


def test_a_property_may_have_the_name_of_a_reference(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"$ref": {"const": 1}, "$id": {"const": 2}}, "required": ["$ref", "$id"]}
    assert json.loads(written(grammars, {**schema, "additionalProperties": False})) == {"$ref": 1, "$id": 2}


@pytest.mark.parametrize(
    ("schema", "most"),
    [
        ({"type": "number"}, 3 * LONGEST_NUMBER + 4),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}, 2 * LONGEST_NUMBER + 5),
        ({"type": "string", "pattern": "^[0-9]{40}$"}, 42),
        ({"enum": [int("1" * 30)]}, 30),
    ],
    ids=["number", "integers", "digits of a string", "one number"],
)
def test_numbers_end_if_they_may(grammars: Grammars, schema: Any, most: int) -> None:
    grammar, text = grammars.for_schema(schema), ""
    while not grammar.is_complete() and len(text) < 400:
        allowed = set(torch.from_numpy(grammar.allowed()).nonzero().flatten().tolist())
        zero, one = byte_tokenizer().convert_tokens_to_ids(["0", "1"])
        token = zero if zero in allowed else one if one in allowed else min(allowed - {2}, default=2)
        if token == 2:
            break
        text += byte_tokenizer().decode([token])
        grammar.accept(token)
    json.loads(text)
    assert len(text) <= most


def test_the_tokenizer_is_taken_apart_once_the_engine_is_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the start, and not while an answer is under way; a request with a schema before then does it itself."""
    monkeypatch.setattr(service_module, "_AFTER_START", 0.0)
    app = tiny_app(tmp_path)
    service: Any = app.app.state.service  # type: ignore[attr-defined]
    assert service.grammars._taken_apart is None
    service.engine.start()
    ticket = service.engine.submit(Request([5, 6, 7], Sampling(max_tokens=400, ignore_end=True)))
    was_left: list[bool] = []
    ticket.listen(lambda chunk: was_left.append(service.grammars._taken_apart is None))  # in the engine's thread
    service.prepare_grammars()
    ticket.result()
    assert len(was_left) > 10 and all(was_left)
    deadline = time.monotonic() + 20
    while service.grammars._taken_apart is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.grammars._taken_apart is not None
    service.engine.stop()


@pytest.mark.slow
def test_forty_schemas_at_temperature_one(real_home: Path) -> None:
    settings = BaseSettings(bits=8)
    service = open_service(settings, Served(base_name="base"))
    assert len(TYPES) == 40
    with TestClient(make_app(service), base_url="http://localhost") as client:
        for name in TYPES:
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema_of(name)}}
            turn = {"role": "user", "content": f"Give an example of: {name}."}
            body = {"model": "base", "messages": [turn], "response_format": form, "max_tokens": 300, "temperature": 1.0}
            [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
            assert choice["finish_reason"] == "stop", (name, choice)
            check_text(name, choice["message"]["content"])


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, Any] = {
    "deep": deep(40),
    "deeper": deep(12) | {"$defs": deep(20)},
    "alternatives": {"anyOf": [{"type": "object", "properties": {f"k{n}": {"type": "string"}}} for n in range(400)]},
    "all of": {"allOf": [{"type": "object", "properties": {f"k{n}": {"type": "string"}}} for n in range(400)]},
    "products": {
        "allOf": [{"anyOf": [{"type": "string", "pattern": f"{n}.*{m}"} for n in range(9)]} for m in range(9)]
    },
    "doubling": {"$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(24)} | {"d24": {}}}
    | {"$ref": "#/$defs/d0"},
    "circle": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"},
    "repetition": {"type": "string", "pattern": "^(([a-z]{1,1000}){1,1000}){1,1000}$"},
    "backtracking": {"type": "string", "pattern": "^(a+)+(.*a){30}$"},
    "lookahead": {"type": "string", "pattern": "(?=a)b"},
    "patterns": {"anyOf": [{"type": "string", "pattern": f"^.*{n}.*$"} for n in range(500)]},
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(1200)}},
    "a megabyte": {"enum": [f"{n:07d}" for n in range(100_000)]},
    "long text": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "long list": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    "huge numbers": {"type": "integer", "minimum": -(10**290), "maximum": 10**290, "multipleOf": 999999937},
    "not": {"not": {"type": "string"}},
    "unknown format": {"type": "string", "format": "of-a-stranger"},
    "impossible": {"type": "object", "required": ["a"], "properties": {"a": False}},
    "another file": {"$ref": "file:///etc/passwd"},
    "another place": {"properties": {"a": {"$ref": "http://127.0.0.1:9/schema"}}},
    "an id": {"$id": "http://127.0.0.1:9/", "$ref": "other"},
    "options": {"x-guidance": {"whitespace_pattern": "[ ]*"}, "type": "object"},
    "no type": {"type": "bird"},
    "type of another type": {"type": 3, "properties": []},
}
#: Hostile schemas that are cheap, so that they are answered by text; all others are refused.
KEPT_TO = {"doubling", "patterns", "repetition", "backtracking", "long text", "long list", "deeper"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_answered_at_once(client: openai.OpenAI, name: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": HOSTILE[name]}}
    before, turn = time.monotonic(), [{"role": "user", "content": "hi"}]
    try:
        client.chat.completions.create(
            model="red", messages=turn, response_format=form, max_tokens=8, temperature=1.0, seed=1
        )
        outcome = "kept to"
    except openai.BadRequestError as error:
        outcome = "refused"
        assert "schema" in error.message or "grammar" in error.message
    took = time.monotonic() - before
    assert took < 2  # alone it is below 1, see the lab; here others share the processor
    assert (outcome == "kept to") == (name in KEPT_TO)


def test_a_state_is_one_answers_own(grammars: Grammars) -> None:
    first = grammars.for_schema({"enum": ["ab", "cd"]})
    second = first.copy()
    for token in byte_tokenizer()('"a', add_special_tokens=False)["input_ids"]:
        first.accept(token)
    assert int(first.allowed().sum()) == 1 and int(second.allowed().sum()) == 1
    assert (first.allowed() != second.allowed()).any()


def test_a_tokenizer_that_cannot_be_taken_apart() -> None:
    with pytest.raises(ApiError, match="fast tokenizer"):
        Grammars(byte_tokenizer(), []).for_schema({"type": "string"})
