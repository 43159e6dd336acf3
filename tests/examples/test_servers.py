"""The examples of deployment start a server that the command line accepts."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.http_server import BASE, HTTP, USER, save_adapters, save_chat_base, serving
from lorakeet.cli.serve import serve
from lorakeet.cli.shared.options import typer_command

EXAMPLES = Path(__file__).parents[2] / "examples"


def check(words: list[str]) -> None:
    assert words[:2] == ["lorakeet", "serve"]
    typer_command(serve).make_context("serve", words[2:])


def test_the_container_starts_a_server_with_a_key() -> None:
    file = (EXAMPLES / "serve" / "Dockerfile").read_text(encoding="utf-8")
    words = [json.loads(found) for found in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", file, re.M)]
    check([*words[0], *words[1]])
    assert "--api-key-file" in words[0] and re.search(r"^USER lorakeet$", file, re.M)
    for name in re.search(r"^COPY (.*) \./$", file, re.M)[1].split():  # type: ignore[index]
        assert (EXAMPLES.parent / name).exists()


def test_the_unit_starts_a_server_and_gives_it_time_to_stop() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(EXAMPLES / "serve" / "lorakeet.service")
    program, *words = unit["Service"]["ExecStart"].split()
    check([Path(program).name, *words])
    assert int(unit["Service"]["TimeoutStopSec"]) >= 600 and unit["Service"]["NoNewPrivileges"] == "yes"


def test_a_replica_of_the_ray_example_answers(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("ray_serve", EXAMPLES / "ray_serve.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    base = save_chat_base(tmp_path / BASE)
    adapters = save_adapters(base, tmp_path / "adapters", {"red": 1})
    (tmp_path / "keys").write_text(USER, encoding="utf-8")
    app = example.builder({"base.model": str(base)}, str(adapters), str(tmp_path / "keys"), [])()
    with serving(app) as url:
        models = HTTP.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {USER}"}).json()["data"]
        assert [model["id"] for model in models] == [BASE, "red"] and HTTP.get(f"{url}/v1/models").status_code == 401


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_the_ray_example_needs_ray_only_to_run() -> None:
    shown = subprocess.run([sys.executable, str(EXAMPLES / "ray_serve.py"), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--replicas" in shown.stdout
