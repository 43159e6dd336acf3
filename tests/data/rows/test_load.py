"""From a name to rows: finding the data, choosing the column, folders, and every complaint on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from lorakeet.config import DataSettings, TaskName
from lorakeet.data.read.column_types import type_names
from lorakeet.data.rows import load
from lorakeet.data.rows.kinds import canonical
from lorakeet.data.rows.load import Rows, peek, read_rows
from lorakeet.errors import DataError

Put = Callable[..., Path]


def rows_of(path: Path | str, **more: Any) -> list[str | None]:
    return rows_in(path, **more).data["text"][:]


def peek_names(path: Path) -> dict[str, str]:
    return {name: type_names(types) for name, types in peek(DataSettings(path=str(path))).items()}


def rows_in(path: Path | str, *, task: TaskName = "CAUSAL_LM", **more: Any) -> Rows:
    return read_rows(DataSettings(path=str(path), **more), task)


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
    assert repr(column) in rows_in(path).description


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"saying": "x", "comment": "y"},
            ["more than one", "'saying', 'comment'", "--text-column saying", "data.columns.text=saying"],
        ),
        ({"quote": "x", "content": "y", "n": "z"}, ["more than one", "'quote', 'content'"]),
        ({"text": 7, "tags": ["a"]}, ["no columns for CAUSAL_LM", "'text' (int)", "'tags' (list[str])"]),
    ],
)
def test_an_unclear_column_is_an_error_that_lists_them(put: Put, row: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(put("a.jsonl", jsonl(row)))
    for word in ["a.jsonl", *words]:
        assert word in str(caught.value)


def test_the_named_column_is_taken_or_missed_with_the_nearest_name(put: Put) -> None:
    path = put("a.jsonl", jsonl({"quote": "x", "comment": "y"}))
    assert rows_of(path, columns={"text": "comment"}) == ["y"]
    with pytest.raises(DataError) as caught:
        rows_of(path, columns={"text": "coment"})
    assert "no column 'coment'" in caught.value.message and "'quote' (str)" in caught.value.message
    assert caught.value.hint == "did you mean 'comment'?"


def test_values_that_are_no_strings_are_refused_with_their_line(put: Put) -> None:
    path = put("a.jsonl", jsonl({"text": "a"}, {"text": None}, {"text": 7}, {"text": ["b"]}))
    with pytest.raises(DataError, match="line 3: column 'text' holds int, expected a string; line 4: .* holds list"):
        rows_of(path)
    half = put("half.jsonl", '{"text": "fine"}\n{"text": "half: \\ud83d"}')
    with pytest.raises(DataError, match=r"line 2: column 'text' holds half a character, \\ud83d"):
        rows_of(half)


def test_null_is_a_row_without_text_and_limit_counts_rows(put: Put) -> None:
    path = put("a.jsonl", jsonl({"text": "a"}, {"text": None}, {"text": "b"}))
    assert rows_of(path) == ["a", None, "b"]
    assert rows_of(path, limit=2) == ["a", None]


def test_several_formats_in_one_folder(put: Put) -> None:
    folder = put("all/a.fortune", "Hi.\n\t\t-- Me\n%\nHo.\n").parent
    put("all/b.txt", "One.\nTwo.")
    put("all/c.csv", "quote\nThree.")
    rows = rows_in(folder)
    assert rows.data["text"][:] == ["Hi.\n-- Me", "Ho.", "One.", "Two.", "Three."]
    assert [str(location).rpartition("/")[2] for location in rows.locations] == [
        "a.fortune:1",
        "a.fortune:4",
        "b.txt:1",
        "b.txt:2",
        "c.csv:2",
    ]
    assert "3 files, csv and fortune and text" in rows.description
    assert (
        rows.description.endswith("text in column 'text', 'quote'") and rows.data.info.description == rows.description
    )
    assert rows_of(folder, limit=3) == ["Hi.\n-- Me", "Ho.", "One."]


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
    with pytest.raises(DataError, match=r"picture\.png: a PNG image, expected text"):
        rows_of(folder)


def test_faults_of_all_files_are_told_at_once(put: Put) -> None:
    folder = put("all/a.jsonl", jsonl({"text": "a"}, {"text": 7}) + "\nbroken\n" + jsonl({"text": "b"})).parent
    put("all/b.csv", "text,n\nx,1,2\ny,2\n")
    put("all/c.txt", "x\n" + "\0\n" * 1500)
    put("all/d.jsonl", "")
    put("all/e.jsonl", jsonl({"text": 1.5}, {"text": "e"}))
    with pytest.raises(DataError) as caught:
        rows_of(folder)
    for words in (
        "a.jsonl: line 2: column 'text' holds int, expected a string; line 3: not JSON",
        "b.csv: line 2: 3 fields, expected 2",
        "c.txt: line 2: a zero byte, expected UTF-8 text; line 3: ",
        "and 1,497 more; and 2 more files",
    ):
        assert words in caught.value.message
    assert caught.value.hint


def test_every_format_gives_the_same_rows(put: Put, tmp_path: Path) -> None:
    records = [{"text": "naïve, ☃", "label": 1}, {"text": 'a "b"\nc', "label": 0}, {"text": "d", "label": 1}]
    table = datasets.Dataset.from_list(records)
    paths = [put("a.jsonl", jsonl(*records)), put("a.json", json.dumps(records))]
    for name, write in (("a.csv", table.to_csv), ("a.parquet", table.to_parquet), ("saved", table.save_to_disk)):
        write(str(tmp_path / name))
        paths.append(tmp_path / name)
    paths.append(
        put(
            "a.tsv",
            (tmp_path / "a.csv").read_text().replace(",1", "\t1").replace(",0", "\t0").replace(",label", "\tlabel"),
        )
    )
    for path in paths:
        rows = rows_in(path, task="SEQ_CLS")
        assert list(rows.data) == records, path
        assert rows.data.features["label"] == datasets.Value("int64"), path
        assert rows.layout.kind == "classes" and "label in column 'label'" in rows.description
        assert peek_names(path) == {"text": "str", "label": "int"}, path


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"text": ["a", "b"], "picture": [b"x" * 10, b"y"], "meta": [{"body": "c", "n": 1}, None]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    seen: list[Any] = []
    monkeypatch.setattr(load, "canonical", lambda row, layout: seen.append(row.values) or canonical(row, layout))
    assert rows_of(tmp_path / "a.parquet") == ["a", "b"]
    assert rows_of(tmp_path / "a.parquet", columns={"text": "meta.body"}) == ["c", None]
    assert [list(values) for values in seen] == [["text"], ["text"], ["meta"], ["meta"]]


def test_a_column_that_is_seen_late_counts_as_any(put: Put) -> None:
    rows = [{"n": 1}] * 2000 + [{"n": 2, "text": "late"}]
    assert rows_of(put("a.jsonl", jsonl(*rows)))[-2:] == [None, "late"]
    late = put("a.csv", "text,label\n" + "x,1\n" * 2000 + "y,none\n")
    rows = rows_in(late, task="SEQ_CLS").data
    assert rows["label"][-2:] == ["1", "none"]  # names, of which most are digits


def test_sources_of_one_kind_may_call_their_columns_differently(put: Put) -> None:
    folder = put("all/a.jsonl", jsonl({"text": "a", "label": 1})).parent
    put("all/b.csv", "review,category,text2\nb,0.5,c")
    rows = rows_in(folder, task="SEQ_CLS")
    assert rows.data.to_dict() == {
        "text": ["a", "b"], "text_pair": [None, "c"], "label": [1.0, 0.5],
    }  # fmt: skip
    put("all/c.jsonl", jsonl({"text": "c", "label": "good"}))
    with pytest.raises(DataError, match=r"c\.jsonl has label of type str, others have"):
        rows_in(folder, task="SEQ_CLS")
    put("all/b.csv", "text\nb")
    put("all/c.jsonl", jsonl({"prompt": "c", "completion": "d"}))
    with pytest.raises(DataError, match="of more than one kind"):
        rows_in(folder)


def test_one_row_and_a_label_that_is_left_unused(put: Put) -> None:
    rows = rows_in(put("a.jsonl", jsonl({"text": "x", "label": 1, "n": 2})))
    assert rows.data.to_dict() == {"text": ["x"]}
    assert [str(location) for location in rows.locations] == [f"{rows.locations[0].source}:1"]
    assert rows.description.endswith("text in column 'text'; CAUSAL_LM leaves 'label' unused")


def test_the_embedded_quotations_are_texts_and_may_be_classes() -> None:
    rows = rows_in("fortunes")
    assert len(rows.data) == 12_363 and rows.data.column_names == ["text"]
    assert rows.description == "fortunes (fortune), text in column 'text'"
    labels = rows_in("fortunes", task="SEQ_CLS", columns={"label": "author"}, limit=2000).data["label"][:]
    assert {None, "Mark Twain"} < set(labels)


def test_several_paths_follow_each_other(put: Put) -> None:
    first, second = put("a.jsonl", jsonl({"text": "a"})), put("b.txt", "b\nc")
    rows = read_rows(DataSettings(path=[str(second), str(first), str(first.parent / "*.txt")]))
    assert rows.data["text"][:] == ["b", "c", "a", "b", "c"]
    assert rows.description.startswith(f"{second}, {first}, {first.parent}/*.txt (3 files, jsonl and text)")


def test_peek_tells_columns_or_why_not(put: Put) -> None:
    path = put("a.jsonl", "broken\n" + jsonl({"a": {"b": [1]}, "c": None}))
    assert peek_names(path) == {"a": "dict", "a.b": "list[int]", "c": "null"}
    with pytest.raises(DataError, match=r"a\.jsonl: line 1: not JSON"):
        peek(DataSettings(path=str(put("a.jsonl", "broken"))))
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        peek(DataSettings(path=str(put("a.parquet", "broken"))))
    with pytest.raises(DataError, match=r"a\.csv: empty"):
        peek(DataSettings(path=str(put("a.csv", "text,n\n"))))


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
from lorakeet.data.rows.load import read_rows
from lorakeet.errors import DataError

def ask(**settings):
    try:
        rows = read_rows(DataSettings(**settings))
        print(rows.data["text"][:], rows.description)
    except DataError as error:
        print(error.message)

ask(path="me/quotes")
ask(path="me/quotes", limit=1, columns={"text": "n.en"})
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
    found, limited, missing, split, subset = done.stdout.splitlines() or [done.stderr] * 5
    assert found == "['Hi.', 'Ho.'] me/quotes (hub), text in column 'quote'"
    assert limited.startswith("['one']")
    assert missing == "no file or folder 'me/nothing' here, and no such data set on the hub"
    assert "cannot read 'me/quotes' from the hub" in split and "test" in split
    assert "cannot read 'me/quotes' from the hub" in subset and "large" in subset
    assert (tmp_path / "ours" / "datasets" / "me___quotes").is_dir()
    assert not (tmp_path / "user").exists()  # nothing is written to the user's home unasked
