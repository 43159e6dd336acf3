"""The table of guards in the docs: each row is planted, and the page shows what a user really sees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import guards.planted_adapters
import guards.planted_trainings  # noqa: F401  (both register their rows)
from guards.planting import PLANTED, seen

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "guards.md"
#: Rows without a message of their own: they cannot happen.
SILENT = {8, 16, 21}


def table() -> dict[int, tuple[str, str]]:
    """Return what a user sees and the tests of each row, as the page has them."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| (\d+) \|", line):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[int(match[1])] = cells[2], cells[3]
    return rows


def test_the_page_has_every_row() -> None:
    assert sorted(table()) == list(range(1, 25)) and PLANTED.keys() | SILENT == set(table())
    text = PAGE.read_text(encoding="utf-8")
    assert f"For {len(PLANTED)} of the 24 rows" in text and not PLANTED.keys() & SILENT


@pytest.mark.parametrize("row", sorted(PLANTED))
def test_a_planted_failure_shows_what_the_page_says(row: int, tmp_path: Path) -> None:
    assert re.findall(r"`([^`]+)`", table()[row][0]) == seen(row, tmp_path)


@pytest.mark.parametrize("row", range(1, 25))
def test_the_tests_of_a_row_exist(row: int) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table()[row][1])
    assert named, "no test is named"
    for file, function in named:
        assert re.search(rf"^def {function}\(", (REPOSITORY / file).read_text(encoding="utf-8"), re.M), (file, function)
