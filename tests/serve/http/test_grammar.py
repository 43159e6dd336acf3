"""JSON schemas: answers keep to them, hostile ones are answered in less than a second, and none is passed over in part."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
import torch

from helpers.tiny_base import byte_tokenizer
from lorakeet.serve.http.errors import ApiError
from lorakeet.serve.http.grammar import Grammars


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_tokenizer(), [2])


def written(grammars: Grammars, schema: Any, seed: int = 0, most: int = 400) -> str:
    """Return an answer whose tokens are drawn at random from those that are allowed."""
    grammar, generator = grammars.for_schema(schema), torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not grammar.is_complete() and len(tokens) < most:
        allowed = grammar.allowed().nonzero().flatten()
        token = int(allowed[int(torch.randint(len(allowed), (1,), generator=generator))])
        if token == 2:
            break
        tokens.append(token)
        grammar.accept(token)
    text: str = byte_tokenizer().decode(tokens)
    return text


SMALL: dict[str, tuple[Any, Any]] = {  # schema, and a check of the value
    "constant": ({"const": "bird"}, lambda value: value == "bird"),
    "choice": ({"enum": [1, "two", None, True]}, lambda value: value in (1, "two", None, True)),
    "bounds": ({"type": "integer", "minimum": 3, "maximum": 5}, lambda value: 3 <= value <= 5),
    "length": ({"type": "string", "minLength": 2, "maxLength": 3}, lambda value: 2 <= len(value) <= 3),
    "pattern": (
        {"type": "string", "pattern": "^[ab]{1,4}$"},
        lambda value: 0 < len(value) < 5 and set(value) <= set("ab"),
    ),
    "date": ({"type": "string", "format": "date"}, lambda value: len(value) == 10 and value[4] == "-"),
    "list": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
        lambda value: len(value) == 2 and all(isinstance(one, bool) for one in value),
    ),
    "reference": (
        {
            "$defs": {"n": {"enum": [1, 2]}},
            "type": "array",
            "items": {"$ref": "#/$defs/n"},
            "minItems": 1,
            "maxItems": 2,
        },
        lambda value: set(value) <= {1, 2},
    ),
    "one of": ({"oneOf": [{"const": 1}, {"type": "null"}]}, lambda value: value in (1, None)),
    "a property named $ref": (
        {"type": "object", "properties": {"$ref": {"const": 1}}, "required": ["$ref"], "additionalProperties": False},
        lambda value: value == {"$ref": 1},
    ),
}


@pytest.mark.parametrize(("schema", "check"), SMALL.values(), ids=SMALL)
def test_any_allowed_text_is_valid(grammars: Grammars, schema: Any, check: Any) -> None:
    for seed in range(5):
        value = json.loads(written(grammars, schema, seed))
        assert check(value), value


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
    assert not torch.equal(first.allowed(), second.allowed())


def test_a_tokenizer_that_cannot_be_taken_apart() -> None:
    with pytest.raises(ApiError, match="fast tokenizer"):
        Grammars(byte_tokenizer(), []).for_schema({"type": "string"})
