"""Scripts of ``examples/``, run as on the command line."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def made(monkeypatch: pytest.MonkeyPatch, script: str, out: Path, *words: str) -> list[dict[str, Any]]:
    """Run a script with ``words`` and return the rows that it writes to ``out``."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
