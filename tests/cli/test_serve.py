"""The command serve: errors before anything is loaded, and a process that answers, and stops at SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.http_server import HTTP, USER, save_adapters, save_chat_base
from lorakeet.cli import main


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakeet.serve.http import start

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(start, "open_model", fail)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--adapters", "nowhere"], "expected a folder"),
        (["--adapter", "folder"], "NAME=FOLDER"),
        (["--adapter", "a/b=."], "NAME=FOLDER"),
        (["--adapter", "a=nowhere"], "is no folder"),
        (["--adapter", "a=.", "--adapter", "a=."], "given twice"),
        (["--host", "0.0.0.0"], "there is no key"),
        (["--host", "192.0.2.1", "--api-key-file", "keys"], "cannot listen at 192.0.2.1"),
        (["--host", "no such host", "--api-key-file", "keys"], "cannot listen at"),
        (["--api-key-file", "nowhere"], "is no file"),
        (["--api-key-file", "empty"], "has no key"),
        (["--admin-key-file", "keys"], "none of callers"),
        (["--port", "70000"], "65535"),
        (["--max-rows", "0"], "--max-rows"),
        (["--timeout", "nan"], "--timeout"),
        (["--task", "SEQ"], "task.type"),
        (["--bits", "3"], "bits"),
        (["--adapter", "a=."], "adapter_config.json"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_bad_words(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text(USER, encoding="utf-8")
    (tmp_path / "empty").touch()
    assert main(["serve", "--port", "0", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and part in error and "\nhint: " in error and USER not in error


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lorakeet.serve import http

    monkeypatch.setattr(http, "LIBRARIES", ("uvicorn", "no_such_library"))
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == "error: no_such_library not installed\nhint: pip install 'lorakeet[serve]'\n"


def test_help_imports_no_server() -> None:
    code = "import sys\nfrom lorakeet.cli import main\nmain(['serve', '--help'])\nimport lorakeet\n"
    code += "print([name for name in ('torch', 'fastapi', 'uvicorn', 'llguidance') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and "lorakeet serve --adapters" in done.stdout


@pytest.mark.slow
def test_a_process_answers_and_stops(tmp_path: Path) -> None:
    base = save_chat_base(tmp_path / "base")
    adapters = save_adapters(base, tmp_path / "adapters", {"red": 1})
    (tmp_path / "keys").write_text(USER, encoding="utf-8")
    words = ["serve", "--model", str(base), "--adapters", str(adapters), "--port", "0", "--api-key-file", "keys"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakeet", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("ready"):
            break
    url = lines[-1].split()[-1]
    assert any(line.split()[:2] == ["red", "1"] for line in lines) and USER not in "".join(lines)
    body = {"model": "red", "prompt": "a secret prompt", "max_tokens": 3}
    got = HTTP.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {USER}"})
    assert got.json()["usage"]["completion_tokens"] == 3
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(30) == 0 and "secret" not in rest and "Traceback" not in rest
