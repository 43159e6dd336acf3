"""A model is downloaded by the real hub client from a small local server with the routes that it needs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = "import sys; from lorakeet.base.load import load_base; print(load_base(sys.argv[1], device='cpu').describe())"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories in ``tmp_path/hub/<org>/<name>``; return the address and the list of downloaded files."""
    root, fetched = tmp_path / "hub", list[str]()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                return self.answer_api(*path.removeprefix("api/models/").split("/")[:3])
            repository, _, file = path.partition(f"/resolve/{COMMIT if COMMIT in path else 'main'}/")
            if not (root / repository / file).is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = (root / repository / file).read_bytes()
            if self.command == "GET":
                fetched.append(file)
            return self.answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

        def answer_api(self, org: str, name: str, what: str = "") -> None:
            files = sorted((root / org / name).iterdir())
            if what == "tree":
                rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
                return self.answer(200, json.dumps(rows).encode(), {})
            info = {"id": f"{org}/{name}", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
            return self.answer(200, json.dumps(info).encode(), {})

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", fetched
        server.shutdown()


@pytest.fixture
def load(hub: tuple[str, list[str]], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "HF_ENDPOINT": hub[0],
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        }
        variables = {**os.environ, "HF_HUB_OFFLINE": "0", **variables}
        return subprocess.run([sys.executable, "-c", LOAD, name], env=variables, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_fetched_once_and_without_pickles(
    hub: tuple[str, list[str]],
    load: Callable[..., subprocess.CompletedProcess[str]],
    save_model: Callable[..., Path],
) -> None:
    repository = save_model("hub/org/tiny")
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "flax_model.msgpack", "modeling_tiny.py"):
        (repository / unwanted).write_bytes(b"not for us")
    first = load("org/tiny")
    assert first.stdout.startswith("org/tiny: "), first.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub[1])
    assert not {"pytorch_model.bin", "consolidated.safetensors", "flax_model.msgpack", "modeling_tiny.py"} & set(hub[1])
    hub[1].clear()
    assert load("org/tiny", HF_HUB_OFFLINE="1").stdout == first.stdout
    assert hub[1] == []


@pytest.mark.slow
def test_an_adapter_and_a_repository_that_is_no_model(
    load: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    adapter, other = tmp_path / "hub/org/adapter", tmp_path / "hub/org/other"
    for folder in (adapter, other):
        folder.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/tiny"}')
    assert (
        "hint: use --adapter org/adapter, or --init-adapter org/adapter to train it further, with --model org/tiny"
        in load("org/adapter").stderr
    )
    assert "'org/other' on the hub is no model: it has no config.json" in load("org/other").stderr
