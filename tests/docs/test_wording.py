"""Docstrings, comments, messages and pages keep the rule of CONTRIBUTING.md, and the checker finds what breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.markdown_pages import PAGES, ROOT
from helpers.wording import offences, sentences, words

SUFFIXES = (".py", ".c", ".h", ".md")


def places() -> dict[str, list[Path]]:
    """Map each room, each folder of tests, and each other folder to its files; pages of the root are one place."""
    found: dict[str, list[Path]] = {"pages": [page for page in PAGES if page.parent == ROOT]}
    for top in ("src/lorakeet", "tests", "docs", "benchmarks", "examples", "scripts"):
        for file in sorted((ROOT / top).rglob("*")):
            if file.suffix in SUFFIXES:
                inner = file.relative_to(ROOT / top).parts
                place = f"{top}/{inner[0]}" if top in ("src/lorakeet", "tests") else top
                found.setdefault(place, []).append(file)
    return found


@pytest.mark.parametrize("place", places())
def test_the_wording_is_plain(place: str) -> None:
    found = [offence for file in places()[place] for offence in offences(file)]
    assert not found, "\n".join(found)


# -- the checker ------------------------------------------------------------------------------------------------------

LONG = "Return " + "one more word " * 9
PYTHON = {
    'def f():\n    """What the function gives."""\n': "imperative verb",
    'def f():\n    """Returns the value."""\n': "imperative verb",
    'def f() -> int:\n    """Whether it is so."""\n': "bool",
    'class C:\n    """What holds the values."""\n': "opens with",
    '"""How the module works."""\n': "opens with",
    'def f(a, b, c, d):\n    """Return the sum."""\n': "no Args",
    f'def f():\n    """{LONG}."""\n': "words, at most 25",
    "#: So many tokens.\nX = 1\n": "unit, meaning, origin",
    "x = 1  # nobody reads it\n": "not plain",
    'raise ValueError("the one is wrong and the other is not")\n': "not plain",
}


@pytest.mark.parametrize("source", PYTHON, ids=range(len(PYTHON)))
def test_an_offence_in_python_is_found(source: str, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(source, encoding="utf-8")
    (found,) = [offence for offence in offences(file) if PYTHON[source] in offence]
    assert found.startswith(f"{file}:")


def test_plain_python_passes(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Sums of values."""\n\n#: Tokens. The most of a pass.\nMOST = 1\n\n\n'
        'def f(a, b, c, d) -> bool:\n    """Return the sum.\n\n    Args:\n        a: [n], in bytes.\n    """\n',
        encoding="utf-8",
    )
    assert not offences(file)


def test_an_offence_in_c_or_on_a_page_is_found(tmp_path: Path) -> None:
    (tmp_path / "loop.c").write_text("/* Its slow truth is elsewhere. */\nint x; // nobody\n", encoding="utf-8")
    assert len(offences(tmp_path / "loop.c")) == 2
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{'word ' * 31}.\n\n```text\n{'word ' * 40}\n```\n", encoding="utf-8")
    (found,) = offences(page)
    assert "31 words, at most 30" in found


def test_code_counts_as_one_word() -> None:
    assert [words(one) for one in sentences("Return `x + y * z` as given. The end.")] == [4, 2]
