"""Tools that people use with ``peft`` work with Lorakeet's models and configurations, with ``peft`` installed and without."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.markdown_pages import ROOT, read
from helpers.peft_users import USERS
from helpers.trl_users import TRAINERS, check_trainer

has_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
#: Trainer and whether it gets a ready model, for the default tests; make test-all runs every pair.
QUICK = {("SFTTrainer", False), ("DPOTrainer", True)}
#: Run in a process of its own: every user, and TRL's trainers with a ready model, without peft.
WITHOUT = """
from pathlib import Path
from helpers.without_peft import hide_peft
hide_peft()
import transformers
assert not transformers.utils.is_peft_available()
from helpers import peft_users
for number, function in enumerate(peft_users.USERS.values()):
    folder = Path({folder!r}) / str(number)
    folder.mkdir()
    function(folder)
from helpers import trl_users
if {trl}:
    for name in trl_users.TRAINERS:
        trl_users.check_trainer(name, Path({folder!r}) / name, ready=True, own=False)
    try:
        trl_users.trained("SFTTrainer", Path({folder!r}), ready=False)
    except ImportError as error:
        assert "peft" in str(error)
    else:
        raise AssertionError("TRL took a configuration without peft")
print("all")
"""


@pytest.mark.parametrize("name", USERS)
def test_user(name: str, tmp_path: Path) -> None:
    USERS[name](tmp_path)


@has_trl
@pytest.mark.parametrize(
    ("name", "ready"),
    [
        pytest.param(name, ready, marks=() if (name, ready) in QUICK else pytest.mark.slow)
        for name in TRAINERS
        for ready in (True, False)
    ],
)
def test_trl(name: str, ready: bool, tmp_path: Path) -> None:
    check_trainer(name, tmp_path, ready=ready)


@pytest.mark.slow
def test_users_without_peft(tmp_path: Path) -> None:
    code = WITHOUT.format(folder=str(tmp_path), trl=importlib.util.find_spec("trl") is not None)
    paths = os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("all\n"), done.stderr[-3000:]


def test_the_page_names_every_user() -> None:
    page = read(ROOT / "docs" / "peft-tools.md")
    assert [name for name in [*USERS, *TRAINERS] if f"`{name}`" not in page] == []
