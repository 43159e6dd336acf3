"""The scripts under ``examples/``, run as a person runs them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def made(monkeypatch: pytest.MonkeyPatch, script: str, out: Path, *words: str) -> list[dict[str, Any]]:
    """The rows that a script writes to ``out`` when it is called with ``words``."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
