"""What data tests share: a tokenizer of one token per byte whose padding is its end token, files, a small hub."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def make_byte_tokenizer(end: str | None = END) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer()


@pytest.fixture
def endless_tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer(end=None)


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file below the test's folder."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


QUOTES = b'{"quote": "Hi.", "n": {"en": "one"}}\n{"quote": "Ho.", "n": {"en": "two"}}\n'
COMMIT = "a" * 40


class _Hub(BaseHTTPRequestHandler):
    """The few routes of a hub that has one data set, ``me/quotes``, of one file."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = {"type": "file", "oid": "b" * 40, "size": len(QUOTES), "path": "train.jsonl"}
        if path.startswith("/api/datasets/me/quotes/tree"):
            self._answer(200, json.dumps([file]).encode())
        elif path.startswith("/api/datasets/me/quotes"):
            self._answer(200, json.dumps({"id": "me/quotes", "sha": COMMIT, "siblings": [], "tags": []}).encode())
        elif path == f"/datasets/me/quotes/resolve/{COMMIT}/train.jsonl":
            self._answer(200, QUOTES, ETag='"1"')
        else:
            known = path.startswith("/datasets/me/quotes/")
            self._answer(404, b"", **{"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub_endpoint() -> Iterator[str]:
    """The address of a small hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
