"""The architecture page is true: rooms, imports, file tree and picture are those of the sources, and no rule is broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from draw_imports import draw, edges, nearest, positions, table
from file_tree import PAGE, first_sentence, tree, with_tree
from helpers.markdown_pages import ROOT, read
from import_graph import (
    Graph,
    circles,
    floors,
    function_lines,
    long_files,
    module_graph,
    parse,
    room_graph,
    room_of,
    source_files,
    upward,
    violations,
)

LEAVES = {"errors", "log", "files", "ignore_index", "rng", "_optional_imports", "text_files", "eval_mode", "security"}


def graph(**imports: str) -> Graph:
    return {module: frozenset(others.split()) for module, others in imports.items()}


# -- the rules --------------------------------------------------------------------------------------------------------


def test_no_rule_of_the_house_is_broken() -> None:
    assert not violations(module_graph())


def test_a_circle_is_found_however_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from lorakeet import b\n", encoding="utf-8")
    (tmp_path / "b.py").write_text("def f():\n    from lorakeet.c import g\n", encoding="utf-8")
    (tmp_path / "c.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lorakeet.a\n", encoding="utf-8"
    )
    (tmp_path / "d.py").write_text("from lorakeet.a import x\n", encoding="utf-8")
    modules = module_graph(tmp_path)
    assert modules == graph(a="b", b="c", c="a", d="a")
    assert circles(modules) == [["a", "b", "c"]]
    with pytest.raises(ValueError, match="circle"):
        floors(modules)
    assert "circle of modules: a, b, c" in violations(modules)
    assert "rooms in a circle: a, b, c" in table(modules)


@pytest.mark.parametrize(
    ("module", "imports"),
    [
        ("errors", "config"),
        ("data.read.record", "data.rows.split"),
        ("kernels.cpu.memory", "kernels.int8.linear"),
        ("adapter.inspect", "inference.predict"),  # one layer, two rooms
    ],
)
def test_an_import_upward_or_sideways_is_found(module: str, imports: str) -> None:
    assert upward({module: frozenset({imports})}) == [(module, imports)]
    assert not upward({"cli.train": frozenset({imports})})


def test_length_leaves_the_docstring_out(tmp_path: Path) -> None:
    file = tmp_path / "long.py"
    file.write_text('def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n', encoding="utf-8")
    assert function_lines(parse(file).body[0]) == 3


def test_long_files_are_found() -> None:
    assert len(long_files(most=0)) == sum(bool(read(file)) for file in source_files())


def test_inner_rooms_are_rooms() -> None:
    assert room_of("data.read.record") == "data.read"
    assert room_of("data.prepare") == "data"
    assert room_of("kernels.cpu") == "kernels.cpu"
    assert room_of("train.trainer") == "train"


# -- the page ---------------------------------------------------------------------------------------------------------


def test_rooms_import_what_the_page_allows() -> None:
    rows = re.findall(r"^\| ([\w., ]+) \| (.+) \|$", read(PAGE), re.MULTILINE)
    allowed = {room: set(re.findall(r"[\w.]+", may)) for names, may in rows for room in names.split(", ")}
    rooms = room_graph(module_graph())
    assert set(rooms) == set(allowed) - {"room"}
    for room, imports in rooms.items():
        for other in imports - LEAVES - allowed[room]:
            parent = other.partition(".")[0]
            is_of_a_named_room = parent != room.partition(".")[0] and parent in allowed[room]
            assert is_of_a_named_room or room == "cli", f"{room} imports {other}"


def test_the_tree_is_that_of_the_sources() -> None:
    assert with_tree(read(PAGE)) == read(PAGE), "run `make docs`"
    listed = re.findall(r"^ +(\w+\.(?:py|c|h)) ", tree(), re.MULTILINE)
    assert len(listed) == sum(file.stem not in ("__init__", "__main__", "_version") for file in source_files())


def test_a_description_is_the_first_sentence() -> None:
    text = "LoRA+: a rate for B (Hayou et al. 2024),\nof :func:`~a.b` and ``c``. More\nof it.\n\nElse."
    assert first_sentence(text) == "LoRA+: a rate for B (Hayou et al. 2024), of a.b and c"


def test_the_picture_shows_the_imports_of_now(tmp_path: Path) -> None:
    rooms = room_graph(module_graph())
    assert Image.open(ROOT / "docs" / "images" / "rooms.png").text["Description"] == edges(rooms), "run `make picture`"
    draw(graph(a="b c", b="c", c=""), str(tmp_path / "small.png"))
    assert Image.open(tmp_path / "small.png").text["Description"] == "a: b c; b: c; c: "


def test_positions_are_floors() -> None:
    rooms = graph(a="b c", b="c", c="", d="c")
    middle = positions(rooms)
    assert middle["a"][1] > middle["b"][1] == middle["d"][1] > middle["c"][1]
    assert len(set(middle.values())) == len(rooms)
    assert nearest(rooms) == {("a", "b"), ("b", "c"), ("d", "c")}
