"""Fixtures of the documentation: a folder with data and a finished run, built once and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.tiny_base import finish_a_run, furnish


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = furnish(tmp_path_factory.mktemp("furnished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKEET_HOME", str(tmp_path_factory.mktemp("home")))
        patch.chdir(folder)
        finish_a_run()
    return folder


@pytest.fixture
def here(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    return folder
