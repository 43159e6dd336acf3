"""The page on serving tells the routes, fields and figures that there are."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.http_server import USER
from helpers.markdown_pages import ROOT, read
from lorakeet.serve.http import grammar
from lorakeet.serve.http.app import LARGEST_BODY
from lorakeet.serve.http.gate import Gate
from lorakeet.serve.http.schema.chat import ChatBody
from lorakeet.serve.http.schema.completions import CompletionBody
from lorakeet.serve.http.schema.fields import Refused, SamplingBody

PAGE = read(ROOT / "docs" / "serving.md")


def honoured(body: type[SamplingBody]) -> set[str]:
    return {name for name, field in body.model_fields.items() if field.annotation is not type(None)}


def test_every_field_is_told() -> None:
    rows = dict(re.findall(r"^\| (`model`.*|`messages`.*|`prompt`.*|`store`.*) \| ([^|]+) \|$", PAGE, re.M))
    told = {of.split()[0]: set(re.findall(r"`(\w+)`", fields)) for fields, of in rows.items()}
    common, neutral = honoured(SamplingBody), told["accepted"]
    assert (
        told["chats"] | told["completions"] and SamplingBody.model_fields["user"].annotation is type(None) and Refused
    )
    fields = {of: set(re.findall(r"`(\w+)`", names)) for names, of in rows.items()}
    assert fields["chats and completions"] == common
    assert fields["chats"] == honoured(ChatBody) - common - neutral
    assert fields["completions"] == honoured(CompletionBody) - common - neutral


def test_every_route_is_told(app: Gate) -> None:
    aliases = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models/{model}"}
    routes = {path.replace("{name}", "NAME") for path in app.app.openapi()["paths"]} - aliases
    assert routes == set(re.findall(r"`(?:GET|POST|DELETE) (/[\w/]+)`", PAGE))


def test_every_figure_is_told(app: Gate) -> None:
    samples = re.findall(r"^# TYPE (\w+)", app.app.state.metrics.text().decode(), re.M)
    assert {name for name in samples if not name.endswith("_created")} == set(re.findall(r"`(lorakeet_\w+)`", PAGE))


def test_limits_are_told() -> None:
    assert f"{grammar.LARGEST_SCHEMA:,} characters" in PAGE and f"{LARGEST_BODY >> 20} MB" in PAGE


def test_the_page_shows_no_key() -> None:
    assert USER not in PAGE and Path(ROOT / "examples" / "serve").is_dir()
