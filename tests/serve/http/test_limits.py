"""Limits: a full queue, deadlines, callers who leave, slow readers, and a stop that drains."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.http_server import HTTP, serving, tiny_app
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.http.access.gate import Gate
from lorakeet.serve.http.service import Limits

LONG = {"model": "red", "prompt": "hi", "max_tokens": 400, "temperature": 1.0, "logit_bias": {"2": -100}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """Return an app with two rows and a queue of two."""
    limits = Limits(answer_tokens=450, timeout=30)
    return tiny_app(tmp_path_factory.mktemp("small"), limits=limits, max_rows=2, queue=2)


@pytest.fixture(scope="module")
def engine(small: Gate) -> Engine:
    engine: Engine = small.app.state.service.engine
    return engine


@pytest.fixture(scope="module")
def url(small: Gate) -> Iterator[str]:
    with serving(small) as address:
        yield address


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def send(url: str, **fields: Any) -> socket.socket:
    """Send a request for a long answer, and return its connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps({**LONG, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def crowd(url: str, engine: Engine, **fields: Any) -> list[socket.socket]:
    """Fill both rows and then the queue."""
    connections = [send(url, **fields) for _ in range(2)]
    until(lambda: engine.stats().rows == 2)
    connections += [send(url, **fields) for _ in range(2)]
    until(lambda: engine.stats().waiting == 2)
    return connections


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return not stats.rows and not stats.waiting and stats.pages_free + stats.pages_cached == stats.pages


def test_a_full_queue_is_told_at_once(url: str, engine: Engine) -> None:
    connections = crowd(url, engine)
    got = HTTP.post(f"{url}/v1/completions", json=LONG)
    assert got.status_code == 429 and int(got.headers["Retry-After"]) > 0
    assert got.json()["error"] == {
        "message": "the queue of requests is full; try again later",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    assert HTTP.get(f"{url}/health").status_code == 200  # others are answered
    for connection in connections:
        connection.close()
    until(lambda: idle(engine))


def test_all_answers_of_a_body_or_none(url: str, engine: Engine) -> None:
    got = HTTP.post(f"{url}/v1/completions", json={**LONG, "n": 8})
    assert got.status_code == 429
    until(lambda: idle(engine))
    assert HTTP.post(f"{url}/v1/completions", json={**LONG, "n": 2, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_callers_who_leave_free_their_pages(url: str, engine: Engine, stream: bool) -> None:
    for _ in range(5):
        connection = send(url, stream=stream)
        until(lambda: engine.stats().rows == 1)
        connection.close()
        until(lambda: idle(engine))
    assert engine.stats().requests["red", "cancelled"] >= 5


@pytest.mark.slow
def test_two_hundred_callers_who_leave(url: str, engine: Engine) -> None:
    for turn in range(100):
        for stream in (False, True):
            connection = send(url, stream=stream)
            time.sleep(turn % 5 * 0.01)  # in the body, in the queue, in the prompt, in the answer
            connection.close()
    until(lambda: idle(engine), 30)
    assert HTTP.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 2}).status_code == 200


def test_a_caller_who_leaves_in_the_queue(url: str, engine: Engine) -> None:
    connections = crowd(url, engine, stream=True)
    for connection in reversed(connections):
        connection.close()
    until(lambda: idle(engine))


def test_a_slow_reader_holds_nobody_up_and_loses_nothing(url: str, engine: Engine) -> None:
    slow = send(url, stream=True, logprobs=20, max_tokens=80)
    assert HTTP.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 3}).status_code == 200
    until(lambda: idle(engine))
    received = b""
    while b"[DONE]" not in received:
        received += slow.recv(65536)
    slow.close()
    tokens = [len(json.loads(line[6:])["choices"][0]["logprobs"]["tokens"]) for line in events(received)]
    assert sum(tokens) == 80


def events(received: bytes) -> list[bytes]:
    lines = [part for part in received.replace(b"\r\n", b"\n").split(b"\n") if part.startswith(b"data: {")]
    return [line for line in lines if line.endswith(b"}")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_an_answer(url: str, engine: Engine, stream: bool) -> None:
    got = HTTP.post(f"{url}/v1/completions", json={**LONG, "timeout": 0.02, "stream": stream})
    text = got.text.split("data: ")[-2] if stream else got.text
    assert got.status_code == (200 if stream else 408)
    assert json.loads(text)["error"]["code"] == "deadline"
    until(lambda: idle(engine))


def test_limits_of_the_server(url: str) -> None:
    got = HTTP.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 451})
    assert got.status_code == 400 and "450" in got.json()["error"]["message"]
    body = {"model": "red", "messages": [{"role": "user", "content": "hi" * 300}]}
    got = HTTP.post(f"{url}/v1/chat/completions", json=body)
    assert got.json()["error"]["code"] == "context_length_exceeded"


def test_a_stop_finishes_what_is_under_way(tmp_path: Path) -> None:
    app, answers = tiny_app(tmp_path), []
    with serving(app) as address:
        assert HTTP.get(f"{address}/ready").status_code == 200

        def ask() -> None:
            answers.append(HTTP.post(f"{address}/v1/completions", json={**LONG, "max_tokens": 60}))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: app.app.state.service.engine.stats().rows == 3)
    for thread in threads:
        thread.join()
    assert [got.json()["usage"]["completion_tokens"] for got in answers] == [60] * 3
    assert not app.app.state.service.engine.is_running
