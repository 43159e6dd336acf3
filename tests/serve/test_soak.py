"""A minute of ``scripts/soak.py`` on the tiny model: twice as many callers as it can answer, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.http_server import save_adapters, save_chat_base

SOAK = Path(__file__).resolve().parents[2] / "scripts" / "soak.py"


@pytest.mark.slow
def test_nothing_is_lost_under_twice_the_load(tmp_path: Path) -> None:
    base = save_chat_base(tmp_path / "base")
    save_adapters(base, tmp_path / "adapters", {"red": 1, "blue": 2, "spare": 3})
    words = ["--minutes", "1", "--callers", "150", "--model", str(base), "--adapters", str(tmp_path / "adapters")]
    ended = subprocess.run(
        [sys.executable, str(SOAK), *words, "--json", str(tmp_path / "report.json")], capture_output=True, text=True
    )
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["problems"] == [] and ended.returncode == 0, ended.stderr
    assert report["answered"] and report["left"] and report["changes of an adapter"] > 10
