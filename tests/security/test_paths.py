"""Questions about paths: answered for links that lead nowhere, in circles, or to impossible names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lorakeet.security.paths import exists, is_dir, is_file, matching, paths_below

SRC = Path(__file__).parents[2] / "src" / "lorakeet"


@pytest.mark.parametrize("target", ["nothing", "link", "x" * 4000, "y/" * 4000])
def test_a_link_to_nothing_is_nothing(target: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(target[:4095])
    assert not any(question(tmp_path / "link" / "inner") for question in (exists, is_file, is_dir))
    assert not any(question(tmp_path / "link") for question in (exists, is_file, is_dir))


def test_everything_below_is_found(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    (tmp_path / "long").symlink_to(("x" * 4000)[:4095])
    (tmp_path / "circle").symlink_to("a")
    found = sorted(str(path.relative_to(tmp_path)) for path in paths_below(tmp_path))
    assert found == ["a", "a/b", "a/b/file", "circle", "long"]


def test_what_is_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    assert exists(tmp_path) and is_dir(tmp_path) and not is_file(tmp_path)
    assert exists(tmp_path / "link") and is_file(tmp_path / "link") and not is_dir(tmp_path / "link")
    assert not exists(tmp_path / "file" / "inner") and not exists(tmp_path / "a\0b")


def test_a_folder_that_is_removed_while_it_is_read_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    assert matching(tmp_path, "*") == [tmp_path / "a"]
    monkeypatch.setattr(Path, "is_dir", lambda path: True)  # as it was a moment ago
    assert matching(tmp_path / "removed", "*") == []


def test_all_of_the_package_asks_these() -> None:
    """``Path.exists`` and its siblings raise an OSError on a link whose target has too long a name; so does ``rglob``."""
    methods = ("exists", "is_file", "is_dir", "rglob")
    calls = [
        f"{file.relative_to(SRC)}:{node.lineno}"
        for file in SRC.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in methods
    ]
    assert not calls
