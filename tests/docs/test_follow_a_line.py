"""The script that follows one line through data preparation counts what it says it counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from follow_a_line import follow, follow_a_line, holds, table

#: Most files of ``data/`` with a function that takes or returns the line, and most returns to a file already left.
MOST_FILES, MOST_RETURNS = 13, 11
#: The same for all functions that are called, with the line or not. Lower both as data/ gets simpler.
MOST_FILES_CALLED, MOST_RETURNS_CALLED = 23, 51


@pytest.fixture
def walk(tmp_path: Path) -> Callable[[], object]:
    """Two modules that call each other: first, second, first again, second again."""
    (tmp_path / "second.py").write_text("def b(f):\n    f()\n    return 2\ndef d():\n    return 4\n", encoding="utf-8")
    (tmp_path / "first.py").write_text(
        "def a(b, d):\n    b(c)\n    b(c)\n    d()\ndef c():\n    return [x for x in map(lambda x: x, range(3))]\n",
        encoding="utf-8",
    )
    spaces: dict[str, dict] = {}
    for name in ("second", "first"):
        file = tmp_path / f"{name}.py"
        spaces[name] = {}
        exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), spaces[name])
    return lambda: spaces["first"]["a"](spaces["second"]["b"], spaces["second"]["d"])


def test_stays_and_returns_are_counted_at_first_entries(walk: Callable[[], object], tmp_path: Path) -> None:
    way = follow(walk, tmp_path)
    assert [(stay.file, stay.functions, stay.is_return) for stay in way.stays] == [
        ("first.py", ("a",), False),
        ("second.py", ("b",), False),
        ("first.py", ("c",), True),
        ("second.py", ("d",), True),
    ]
    assert (way.files, way.returns) == (2, 2)


def test_other_folders_do_not_count(walk: Callable[[], object], tmp_path: Path) -> None:
    assert follow(walk, tmp_path / "elsewhere").files == 0


def test_a_line_passes_few_files() -> None:
    way = follow_a_line()
    assert way.stays[0].file == "read/text_formats.py" and way.stays[-1].file == "prepare.py", table(way)
    assert way.files <= MOST_FILES and way.returns <= MOST_RETURNS, table(way)


def test_the_calls_for_a_line_are_in_few_files() -> None:
    way = follow_a_line(calls=True)
    assert way.stays[0].file == "prepare.py"
    assert way.files <= MOST_FILES_CALLED and way.returns <= MOST_RETURNS_CALLED, table(way)


def test_only_functions_with_the_text_count(walk: Callable[[], object], tmp_path: Path) -> None:
    assert follow(walk, tmp_path, "a text that no function holds").files == 0


@pytest.mark.parametrize("value", ["a line", b"a line", {"text": ["a line"]}, [("a line",)], {1: {2: "a line"}}])
def test_a_text_is_found_in_a_value(value: object) -> None:
    assert holds(value, "line") and not holds(value, "other")
