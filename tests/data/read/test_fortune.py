"""Fortune files: text kept as written, text that is cleaned, and the real file of some 12,000 quotations."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakeet.data.read.formats import read_file
from lorakeet.data.read.fortune import Quotation, indexed_by, is_rotated, parse_fortunes
from lorakeet.data.read.locate import embedded_fortunes


def test_quotations_between_percent_lines() -> None:
    text = "%% a comment\n%\nOne.\n\tTwo.  \n%\n%\n\nThree.\n\t\t-- A. Author\n%\n"
    assert list(parse_fortunes(text.split("\n"))) == [
        Quotation(3, "One.\n\tTwo.", None),
        Quotation(8, "Three.\n-- A. Author", "A. Author"),
    ]


def test_percent_inside_a_line_separates_nothing() -> None:
    assert [item.text for item in parse_fortunes(["100 %\n", "%d bottles\n", "50%"])] == ["100 %\n%d bottles\n50%"]


@pytest.mark.parametrize(
    ("written", "text", "author"),
    [
        ("Hi.\n\t\t--   Me,  myself", "Hi.\n-- Me, myself", "Me, myself"),
        ("Hi.\n-- Me", "Hi.\n-- Me", "Me"),
        ("Hi.\n\t\t-- Ken Olsen,\n\t\t   of DEC", "Hi.\n-- Ken Olsen, of DEC", "Ken Olsen, of DEC"),
        ("Hi.\n\t\t-- Me\n\n[Or was it?  Ed.]", "Hi.\n-- Me\n\n[Or was it?  Ed.]", "Me"),
        ("To be.\n\t\t-- Kant\nTo do.\n\t\t-- Sartre", "To be.\n-- Kant\nTo do.\n-- Sartre", "Sartre"),
        ("\t-- Gifts --\nThey come.", "\t-- Gifts --\nThey come.", None),
        ("But\n\t-- my cat\n\t-- my dog\n\t-- my cow", "But\n\t-- my cat\n\t-- my dog\n\t-- my cow", None),
        ("He paid\n-- or not --\nfor it.", "He paid\n-- or not --\nfor it.", None),
        ("a\n\t\t---- 2", "a\n\t\t---- 2", None),
    ],
)
def test_attribution(written: str, text: str, author: str | None) -> None:
    assert list(parse_fortunes(written.split("\n"))) == [Quotation(1, text, author)]


def test_overstrikes_become_what_paper_showed() -> None:
    assert next(parse_fortunes(["_\bN_\bO, Ren'\be, go^\but m\"\bobius"])).text == "NO, René, goût möbius"


def index(flags: int) -> bytes:
    """The header that strfile(1) writes: six words of four bytes, the last a delimiter."""
    return b"".join(word.to_bytes(4, "big") for word in (1, 2, 9, 3, flags)) + b"%\0\0\0"


def test_rotated_files_are_known_by_their_index_and_read(put: Callable[..., Path]) -> None:
    plain, rotated = put("plain", "Abc\n%\nDef\n"), put("rotated", codecs.encode("Abc\n%\nDef\n", "rot13"))
    put("plain.dat", index(flags=0x8))
    put("rotated.dat", index(flags=0xC))
    assert not is_rotated(plain) and is_rotated(rotated) and not is_rotated(put("alone", "x"))
    texts = [[row.values["text"] for row in read_file(path) if row.values] for path in (plain, rotated)]
    assert texts == [["Abc", "Def"]] * 2
    assert indexed_by(rotated.with_name("rotated.dat")) == rotated
    assert indexed_by(put("other.dat", "x")) is None


def test_the_real_file() -> None:
    with embedded_fortunes().open(encoding="utf-8") as file:
        quotations = list(parse_fortunes(file))
    assert len(quotations) == 12_363  # the index beside it says 12,363 too
    authors = [item.author for item in quotations if item.author]
    assert 6_100 < len(authors) < 6_200
    assert sum(author.startswith("Mark Twain") for author in authors) > 50
    assert not any("\b" in item.text or item.text != item.text.rstrip() for item in quotations)
    raw = embedded_fortunes().read_text(encoding="utf-8").split("\n")
    assert all(raw[item.line - 1].strip() for item in quotations)
    assert "Zounds!" in raw[quotations[-2].line - 1]
