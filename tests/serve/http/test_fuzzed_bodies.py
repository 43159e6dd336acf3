"""Random bodies, heads and paths: no answer is an error of the server, and each error has the form of all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.http_server import ADMIN, BASE, HTTP
from lorakeet.serve.http.schema.adapters import LoadBody, LoadLoraBody, UnloadLoraBody
from lorakeet.serve.http.schema.chat import ChatBody
from lorakeet.serve.http.schema.completions import CompletionBody
from lorakeet.serve.http.schema.encoders import ClassifyBody, EmbeddingsBody

#: Route -> its body, and fields of one that is answered.
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatBody, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
    "/v1/completions": (CompletionBody, {"prompt": "hi", "max_tokens": 3}),
    "/v1/embeddings": (EmbeddingsBody, {"input": "hi"}),
    "/v1/classify": (ClassifyBody, {"input": "hi"}),
    "/v1/adapters": (LoadBody, {"name": "spare"}),
    "/v1/load_lora_adapter": (LoadLoraBody, {"lora_name": "x", "lora_path": "y"}),
    "/v1/unload_lora_adapter": (UnloadLoraBody, {"lora_name": "x"}),
}
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [BASE, "red", "text", "json_object", "function", "user", "tool", "auto", "none", "", "../x", "<tool_call>"]
    ),
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 0.5, 1e308, 2**31, 2**63, 2**64, 10**300, True, False]), st.integers(-9, 99)
)
SCHEMAS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "string", "array", "integer", "null", 3, ["string", "null"]]),
        "pattern": st.text(max_size=8),
        "minimum": NUMBERS,
        "enum": st.lists(st.one_of(TEXTS, NUMBERS), max_size=3),
        "properties": st.dictionaries(TEXTS, st.just({}), max_size=2),
        "$ref": TEXTS,
    },
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(TEXTS, st.sampled_from(["role", "content", "type", "function", "name"])), inner, max_size=3
        ),
    ),
    max_leaves=8,
)
FORMATS = st.builds(
    lambda schema, name: {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}, SCHEMAS, st.just("a")
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, Any]:
    """Draw a route, and a body that differs from a good one in a few fields."""
    path = draw(st.sampled_from(sorted(BODIES)))
    model, fields = BODIES[path]
    body: dict[str, Any] = {
        **({"model": draw(st.sampled_from([BASE, "red", "x"]))} if "model" in model.model_fields else {}),
        **fields,
    }
    names = st.one_of(st.sampled_from(sorted(model.model_fields)), TEXTS)
    for name in draw(st.lists(names, max_size=3)):
        body[name] = draw(FORMATS if name == "response_format" and draw(st.booleans()) else VALUES)
    if body.get("max_tokens") is None and "max_tokens" in model.model_fields:
        body["max_completion_tokens" if path == "/v1/chat/completions" else "max_tokens"] = 3
    return path, draw(st.one_of(st.just(body), st.just(body), st.just(body), VALUES))


def check(url: str, path: str, body: Any) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": "application/json"}
    got = HTTP.post(url + path, content=json.dumps(body), headers=headers, timeout=20)
    assert got.status_code < 500, (path, body, got.text)
    if got.status_code >= 400:
        error = got.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert "Traceback" not in got.text and "pydantic" not in got.text


QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=25, **QUIET)
@given(case=bodies())
def test_a_body_is_answered_or_refused(url: str, case: tuple[str, Any]) -> None:
    check(url, *case)


@pytest.mark.slow
@settings(max_examples=2500, **QUIET)
@given(case=bodies())
def test_many_bodies_are_answered_or_refused(url: str, case: tuple[str, Any]) -> None:
    check(url, *case)


@settings(max_examples=15, **QUIET)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]),
    path=st.text(
        st.characters(codec="ascii", min_codepoint=33, max_codepoint=126, exclude_characters="?#"), max_size=20
    ),
    start=st.sampled_from(["/", "/v1/models/", "/v1/adapters/", "/v1/"]),
    content=st.binary(max_size=30),
)
def test_a_path_is_answered_or_refused(url: str, method: str, path: str, start: str, content: bytes) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    got = HTTP.request(method, f"{url}{start}{path}", content=content, headers=headers)
    assert got.status_code < 500
