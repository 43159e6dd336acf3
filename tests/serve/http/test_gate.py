"""The gate before every route: keys, hosts, origins, sizes; and no way for a text of a caller into the log."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

from helpers.http_server import ADMIN, HTTP, USER
from lorakeet.errors import ConfigError
from lorakeet.serve.http.access.gate import OPEN, Gate
from lorakeet.serve.http.access.keys import Keys, read_keys
from lorakeet.serve.http.app import make_app
from lorakeet.serve.http.errors import log_unexpected

AS_USER, AS_ADMIN = ({"Authorization": f"Bearer {key}"} for key in (USER, ADMIN))


def routes(app: Gate) -> list[tuple[str, str]]:
    """Return method and path of every route, of parts of the app too."""
    schema = app.app.openapi()["paths"]
    found = [(method.upper(), path) for path, methods in schema.items() for method in methods]
    return [*found, ("GET", "/openapi.json")]


def test_every_route_but_health_needs_a_key(app: Gate, url: str) -> None:
    table = routes(app)
    assert len(table) > 14 and ("POST", "/v1/chat/completions") in table and ("DELETE", "/v1/adapters/{name}") in table
    assert {path for _, path in table} >= OPEN == {"/health"}
    for method, path in [*table, ("GET", "/nothing"), ("OPTIONS", "/v1/models"), ("PUT", "/v1/models")]:
        for headers in ({}, {"Authorization": "Bearer no-such-key"}, {"Authorization": f"Basic {USER}"}):
            got = HTTP.request(method, url + path, headers=headers)
            assert (got.status_code == 401) == (path not in OPEN), (method, path, got.status_code)
            assert path in OPEN or got.json()["error"]["type"] == "authentication_error"


def test_admin_routes_need_an_admin(app: Gate, url: str) -> None:
    admin_only = [(method, path) for method, path in routes(app) if "adapter" in path and method != "GET"]
    assert len(admin_only) == 4
    bodies: dict[str, Any] = {
        "/v1/adapters": {"name": "x"},
        "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "x"},
    }
    for method, path in admin_only:
        body = bodies.get(path, {"lora_name": "x"}) if method == "POST" else None
        got = HTTP.request(method, url + path.format(name="red"), headers=AS_USER, json=body)
        assert got.status_code == 403 and got.json()["error"]["code"] == "admin_only"


def test_without_a_key_of_an_admin_there_is_no_admin() -> None:
    assert not Keys().is_admin(f"Bearer {ADMIN}") and not Keys.of([USER]).is_admin(f"Bearer {USER}")
    assert Keys().opens(None) and not Keys.of([USER]).opens(None) and Keys.of([], [ADMIN]).opens(f"bearer {ADMIN}")
    assert USER not in repr(Keys.of([USER], [ADMIN]))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "evil.example:80"}, 400),
        ({"Host": ""}, 400),
        ({"Host": "localhost.evil.example"}, 400),
        ({"Host": "127.0.0.1.evil.example"}, 400),
        ({"Host": "LOCALHOST:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
    ids=str,
)
def test_names_and_origins(url: str, headers: dict[str, str], status: int) -> None:
    got = HTTP.get(f"{url}/health", headers=headers)
    assert got.status_code == status and "access-control-allow-origin" not in got.headers
    assert HTTP.options(f"{url}/v1/models", headers={**headers, **AS_USER}).status_code in (400, 403, 405)


def test_scripts_of_a_named_page_may_call(app: Gate) -> None:
    page = "https://page.example"
    client = TestClient(make_app(app.app.state.service, origins=[page]), base_url="http://localhost")
    asked = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert client.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == page
    assert client.get("/v1/models", headers={"Origin": page}).status_code == 401
    assert client.get("/v1/models", headers={"Origin": page, **AS_USER}).headers["access-control-allow-origin"] == page
    assert client.options("/v1/completions", headers={**asked, "Origin": f"{page}.evil"}).status_code == 403


@pytest.mark.parametrize(
    ("content", "headers", "status", "part"),
    [
        (b"x" * (3 << 20), {}, 413, "too large"),
        (b"{", {}, 400, "no JSON"),
        (b"\xff", {}, 400, "no JSON"),
        (b"[" * 5000, {}, 400, "nested"),
        (b'{"a": ' * 200 + b"1" + b"}" * 200, {}, 400, "nested"),
        (b'{"model": "tiny", "model": "red", "prompt": "x"}', {}, 400, "twice"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', {}, 400, "no JSON"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', {}, 400, "temperature"),
        (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", {}, 400, "digits"),
        (b'{"model": "tiny", "prompt": "x", "seed": 1e400}', {}, 400, "seed"),
        (b'{"model": "tiny", "prompt": [[]]}', {}, 400, "prompt"),
        (b'{"model": "tiny", "prompt": [-1]}', {}, 400, "prompt"),
        (b'{"model": "tiny", "prompt": [259]}', {}, 400, "259"),
        (b'{"model": "tiny", "prompt": ""}', {}, 400, "prompt"),
        (b"[]", {}, 400, "body"),
        (b"null", {}, 400, "body"),
        (b"", {}, 400, "body"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "application/json"),
        (b"{}", {"Content-Type": ""}, 415, "application/json"),
        (b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
    ],
    ids=range(20),
)
def test_bodies_that_are_refused(url: str, content: bytes, headers: dict[str, str], status: int, part: str) -> None:
    sent = {"Content-Type": "application/json", **AS_USER, **headers}
    got = HTTP.post(f"{url}/v1/completions", content=content, headers=sent)
    error = got.json()["error"]
    assert got.status_code == status and part in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_without_a_length_has_a_limit_too(url: str) -> None:
    parts = (b"x" * 65536 for _ in range(40))
    headers = {"Content-Type": "application/json", **AS_USER}
    assert HTTP.post(f"{url}/v1/completions", content=parts, headers=headers).status_code == 413


def test_errors_of_routes_have_the_form_of_all(url: str) -> None:
    for method, path, status in [("GET", "/nothing", 404), ("PUT", "/v1/models", 405), ("GET", "/v1/models/x", 404)]:
        got = HTTP.request(method, url + path, headers=AS_USER)
        assert got.status_code == status and set(got.json()["error"]) == {"message", "type", "param", "code"}


def test_an_unexpected_error_is_logged_by_its_place_alone(
    app: Gate, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a secret text of a caller")

    monkeypatch.setattr(app.app.state.service, "adapter", fail)
    with caplog.at_level(logging.DEBUG):
        body = {"model": "red", "prompt": "x"}
        got = HTTP.post(f"{url}/v1/completions", json=body, headers=AS_USER)
        log_unexpected(ValueError("another secret"))
    assert got.status_code == 500 and got.json()["error"]["type"] == "server_error"
    assert "RuntimeError at" in caplog.text and "secret" not in caplog.text + got.text


# -- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_read_from_a_file(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\n{USER}\n  {ADMIN}  \n", encoding="utf-8")
    assert read_keys(file) == [USER, ADMIN]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "brief\n", f"{USER} {ADMIN}\n", "schlüssel-der-länge\n"], ids=range(5)
)
def test_bad_files_of_keys(tmp_path: Any, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_keys(file)
    assert str(file) in caught.value.message and (not text.strip() or text.split()[0] not in str(caught.value))


def test_no_file_of_keys(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="is no file"):
        read_keys(tmp_path)
