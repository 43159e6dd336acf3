"""Examples that write data: from a few lines here, and from the real package if it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.example_scripts import made
from lorakeet.errors import DataError

# ---- five_sources.py --------------------------------------------------------------------------------------------

FILES = {
    "fortunes": """Know thyself.
\t\t-- Socrates
%
KNOW   thyself.
%
Q:\tWho is there?
A:\tNobody.
%
Shared by two.
%
"No," said he.
""",
    "limerick": """A bobby of Nottingham Junction
Whose organ had long ceased to function
\tDeceived his good wife
\tFor life.
""",
    "murphy": "shared by TWO.\n%\n"
    + "Whatever can go wrong will go wrong, at the worst of times; and " * 4
    + "so on.\n",
    "startrek": '\t"Beam me up."\n\t"Aye."\n\t\t-- Kirk and Scott, stardate 1.0\n',
    "zippy": "... I want a TACO\n%\n%\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_each_quotation_and_the_file_it_is_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "sources.jsonl"
    rows = made(monkeypatch, "five_sources.py", out, str(out), "--folder", str(folder))
    assert [row["label"] for row in rows] == ["fortunes"] * 3 + ["limerick", "murphy", "startrek", "zippy"]
    assert rows[0]["text"] == "Know thyself."  # once, and without its author
    assert rows[5]["text"] == '"Beam me up."\n\t"Aye."' and not any("two" in row["text"].lower() for row in rows)
    fewer = made(monkeypatch, "five_sources.py", out, str(out), "--folder", str(folder), "--most", "2")
    assert fewer == [rows[0], rows[1], *rows[3:]]


def test_the_traits_of_each_quotation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "traits.jsonl"
    rows = made(monkeypatch, "five_sources.py", out, str(out), "--folder", str(folder), "--multi-label")
    assert [row["label"] for row in rows] == [
        ["attributed"],
        ["dialogue", "question"],
        [],
        ["verse"],
        ["long"],
        ["attributed", "dialogue"],
        [],
    ]


def test_the_real_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sources.jsonl"
    rows = made(monkeypatch, "five_sources.py", out, str(out))
    counts = {name: sum(row["label"] == name for row in rows) for name in FILES}
    assert counts == {"fortunes": 12_336, "limerick": 770, "murphy": 752, "startrek": 201, "zippy": 545}
    assert not any("stardate" in row["text"] for row in rows if row["label"] == "startrek")


# ---- brown.py ---------------------------------------------------------------------------------------------------

BROWN = """

\tThe/at Fulton/np-tl County/nn-tl Grand/jj-tl Jury/nn-tl said/vbd it's/pps+bez ``/`` 1/2/cd ''/'' ./.


Headline/nn-hl --/---hl
	en/fw-in+at-tl masse/fw-nn can't/md* not/* xyz/nil
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "ca01").write_text(BROWN, encoding="utf-8")
    (tmp_path / "cats.txt").write_text("ca01 news\n", encoding="utf-8")
    return tmp_path


def test_sentences_with_plain_tags(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = corpus / "brown.jsonl"
    rows = made(monkeypatch, "brown.py", out, str(corpus), str(out))
    assert [row["tokens"] for row in rows] == [
        ["The", "Fulton", "County", "Grand", "Jury", "said", "it's", "``", "1/2", "''", "."],
        ["Headline", "--"],
        ["en", "masse", "can't", "not", "xyz"],
    ]
    assert [row["tags"] for row in rows] == [
        ["at", "np", "nn", "jj", "nn", "vbd", "pps", "``", "cd", "''", "."],
        ["nn", "--"],
        ["in", "nn", "md*", "*", "nil"],
    ]


def test_coarse_tags(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = corpus / "brown.jsonl"
    rows = made(monkeypatch, "brown.py", out, str(corpus), str(out), "--coarse")
    assert rows[2]["tags"] == ["adposition", "noun", "verb", "adverb", "other"]
    first = ["determiner", "noun", "noun", "adjective", "noun", "verb", "pronoun", "sign", "number", "sign", "sign"]
    assert rows[0]["tags"] == first


def test_a_folder_without_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no file of the Brown corpus"):
        made(monkeypatch, "brown.py", tmp_path / "x", str(tmp_path), str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []
