"""Each file format read, recognised, and refused with its name and line where it is broken."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakeet.data.formats import read_table, recognise
from lorakeet.errors import DataError

Put = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.json", "[]", "json"),
        ("a.jsonl", "{}", "jsonl"),
        ("a.NDJSON", "{}", "jsonl"),
        ("a.csv", "text\nx", "csv"),
        ("a.tsv", "text\nx", "csv"),
        ("a.parquet", "", "parquet"),
        ("a.txt", "One.\nTwo.", "text"),
        ("a.txt", "One.\n%\nTwo.", "fortune"),
        ("quotes", "One.\r\n%\r\nTwo.", "fortune"),
        ("quotes", "100 %\n50 % of it", "text"),
        ("rows", '{"text": "x"}\n{"text": "y"}', "jsonl"),
        ("rows", '[\n{"text": "x"}\n]', "json"),
        ("rows", b"PAR1....", "parquet"),
    ],
)
def test_recognised_by_suffix_or_content(put: Put, name: str, content: str | bytes, format: str) -> None:
    assert recognise(put(name, content)) == format


TEXTS = ["plain", "two\nlines", 'with "quotes", commas; and\ttabs', "naïve \u2028 ☃ 𝄞", " indented"]


def test_json_and_jsonl(put: Put) -> None:
    rows = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    table = read_table(put("a.jsonl", lines))
    assert table.values("text") == TEXTS
    assert list(table.places) == [1, 3, 5, 7, 9]
    assert dict(table.types) == {"text": "str", "n": "int"}
    for content in (rows, {"version": 1, "data": rows}, {"test": [{"text": "no"}], "train": rows}):
        table = read_table(put("a.json", json.dumps(content)))
        assert table.values("text") == TEXTS and table.unit == "row"
    assert read_table(put("a.json", json.dumps({"test": TEXTS, "train": ["no"]})), split="test").values("text") == TEXTS
    assert read_table(put("b.json", lines)).values("text") == TEXTS  # .json by name, one object a line


def test_rows_with_different_keys_have_null_where_one_is_missing(put: Put) -> None:
    table = read_table(put("a.jsonl", '{"text": "a"}\n{"other": "b"}'))
    assert table.values("text") == ["a", None]
    assert table.values("other") == [None, "b"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["C"])), min_size=1))
def test_csv_reads_what_csv_writes(put: Put, delimiter: str, texts: list[str]) -> None:
    path = put("a.csv", "")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "quote"], *enumerate([*texts, "letters"])])
    table = read_table(path)
    assert table.values("quote") == [*texts, "letters"]
    assert dict(table.types) == {"id": "number", "quote": "str"}


def test_csv_places_are_the_lines_where_rows_begin(put: Put) -> None:
    table = read_table(put("a.csv", 'text\r\n"one\r\nand on"\r\n\r\ntwo\r\n' + "x" * 200_000))
    assert table.values("text") == ["one\nand on", "two", "x" * 200_000]
    assert list(table.places) == [2, 5, 6]
    assert csv.field_size_limit() == 131_072  # as it was


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"text": [*TEXTS, None], "n": range(6), "kind": pyarrow.array(list("aabbcc")).dictionary_encode()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    table = read_table(path)
    assert table.values("text") == [*TEXTS, None]
    assert dict(table.types) == {"text": "str", "n": "int64", "kind": "str"}


def test_plain_text(put: Put) -> None:
    table = read_table(put("a.txt", "\ufeffOne.\r\nTwo.  \r\n"))
    assert table.values("text") == ["One.", "Two."] and list(table.places) == [1, 2]
    table = read_table(put("a.txt", "\nOne,\ngoing on.\n \n\n\tTwo.\n"))
    assert table.values("text") == ["One,\ngoing on.", "\tTwo."] and list(table.places) == [2, 6]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\nnonsense', ["line 2", "line 4", "column"]),
        ("a.jsonl", '"a"\n{"text": "b"}', ["line 1 holds str", "expected an object"]),
        ("a.jsonl", '{"text": "a"}\n[1]\n7', ["line 2 holds list", "line 3 holds int"]),
        ("a.jsonl", "[" * 100_000, ["line 1"]),
        ("a.json", '[{"text": "a"},\n{"text": }]', ["not JSON", "line 2"]),
        ("a.json", '{"a": [], "b": []}', ["2 lists", "a, b"]),
        ("a.json", "17", ["holds int", "expected a list"]),
        ("a.csv", "id,text\n1,a\n2,b, c\n3", ["line 3 has 3", "line 4 has 1", "expected 2"]),
        ("a.csv", 'text\nfine\n"left open\nfor ever', ["line 3", "not CSV"]),
        ("a.csv", "text,text\na,b", ["same name twice"]),
        ("a.parquet", "no parquet at all", ["as parquet"]),
        ("a.txt", "fine\nna\xefve".encode("latin-1"), ["line 2", "0xef", "not UTF-8"]),
        ("a.txt", "fine".encode("utf-16"), ["UTF-16"]),
        ("a.txt", b"fine\n\0", ["line 2", "zero byte"]),
        ("a.txt", b"", ["is empty"]),
        ("a.txt", " \n\n", ["is empty"]),
        ("a.json", "", ["is empty"]),
        ("a.json", "[]", ["is empty"]),
        ("a.jsonl", "\n", ["is empty"]),
        ("a.csv", "", ["is empty"]),
        ("a.csv", "text\n", ["is empty"]),
        ("a.txt", "%\n%\n", ["is empty", "no quotation"]),
    ],
)
def test_broken_files_say_where(put: Put, name: str, content: str | bytes, words: list[str]) -> None:
    path = put(name, content)
    with pytest.raises(DataError) as caught:
        read_table(path)
    for word in [name, *words]:
        assert word in str(caught.value)


def test_a_few_complaints_are_written_out_and_the_rest_counted(put: Put) -> None:
    with pytest.raises(DataError, match=r"line 1: .*; line 2: .*; line 3: .*; and 7 more\n") as caught:
        read_table(put("a.jsonl", "x\n" * 10))
    assert caught.value.hint == 'each line must be one object, e.g. {"text": "…"}'


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_table(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_table(tmp_path, "csv")


def test_format_can_be_given(put: Put) -> None:
    path = put("a.dump", '{"text": "a"}\n')
    assert read_table(path, "text").values("text") == ['{"text": "a"}']
    assert read_table(path, "jsonl").values("text") == ["a"]
