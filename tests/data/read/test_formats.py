"""Each file format is recognised and read record by record; a broken record has a fault, and the rest is read."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakeet.data.read.formats import read_file, recognize
from lorakeet.data.read.record import Location, Locations

Put = Callable[..., Path]


def values_of(path: Path, column: str = "text", **more: Any) -> list[Any]:
    rows = list(read_file(path, **more))
    assert not [row for row in rows if row.values is None]
    return [row.values.get(column) for row in rows]  # type: ignore[union-attr]


def places_of(path: Path) -> list[int]:
    return [row.location.number for row in read_file(path)]


def told(path: Path) -> list[tuple[int, str | None]]:
    return [(row.location.number, row.fault and row.fault.message) for row in read_file(path)]


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.json", "[]", "json"),
        ("a.jsonl", "{}", "jsonl"),
        ("a.NDJSON", "{}", "jsonl"),
        ("a.yaml", "- text: x", "yaml"),
        ("a.yml", "", "yaml"),
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
        ("rows", b"ARROW1....", "arrow"),
        ("rows", b"\xff\xff\xff\xff....", "arrow"),
        ("a.arrow", "", "arrow"),
        ("a.jsonl.gz", "", "jsonl"),
        ("a.csv.GZ", "", "csv"),
        ("rows", '\ufeff{"text": "x"}', "jsonl"),
    ],
)
def test_recognised_by_suffix_or_content(put: Put, name: str, content: str | bytes, format: str) -> None:
    assert recognize(put(name, content)) == format


TEXTS = ["plain", "two\nlines", 'with "quotes", commas; and\ttabs', "naïve \u2028 ☃ 𝄞", " indented"]


def test_json_and_jsonl(put: Put) -> None:
    rows = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = put("a.jsonl", lines)
    assert values_of(path) == TEXTS and values_of(path, "n") == [0, 1, 2, 3, 4]
    assert [(row.location.number, row.location.unit) for row in read_file(path)] == [
        (at, "line") for at in (1, 3, 5, 7, 9)
    ]
    for content in (rows, {"version": 1, "data": rows}, {"test": [{"text": "no"}], "train": rows}):
        path = put("a.json", json.dumps(content))
        assert values_of(path) == TEXTS and [row.location.unit for row in read_file(path)] == ["row"] * 5
    assert values_of(put("a.json", json.dumps({"test": TEXTS, "train": ["no"]})), split="test") == TEXTS
    assert values_of(put("b.json", lines)) == TEXTS  # .json by name, one object a line


def test_the_only_list_of_an_object_may_follow_short_members(put: Put) -> None:
    assert values_of(put("a.json", '{"version": 1,\n "data": [\n {"text": "x"}\n]}')) == ["x"]


def test_yaml(put: Put) -> None:
    path = put("a.yaml", yaml.safe_dump([{"text": text} for text in TEXTS], allow_unicode=True))
    assert values_of(path) == TEXTS
    path = put(
        "a.yml",
        "# two\n- text: |\n    a\n\n    b\n  n: 1\n-\n  {n: 2, text: 'c\u2028d'}\n- <<: {n: 3, text: x}\n  text: e",
    )
    assert values_of(path) == ["a\n\nb\n", "c\u2028d", "e"] and values_of(path, "n") == [1, 2, 3]
    assert [str(row.location) for row in read_file(path)] == [f"{path}:{line}" for line in (2, 8, 9)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks(put: Put, end: str, mark: str) -> None:
    for name, lines, column in (
        ("a.jsonl", ['{"text": "a"}', "", '{"text": "b"}'], "text"),
        ("a.csv", ["text,n", "a,1", "b,2"], "text"),
        ("a.txt", ["a", "b"], "text"),
        ("a.txt", ["a", "%", "b", "%"], "text"),
        ("a.json", ['[{"text": "a"},', '{"text": "b"}]'], "text"),
        ("a.yaml", ["- text: a", "- text: b"], "text"),
    ):
        assert values_of(put(name, mark + end.join(lines) + end), column) == ["a", "b"]


def test_a_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert values_of(path) == ["a", "b"]
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-9])
    *_, last = read_file(path)
    assert last.fault is not None and "cannot be read" in last.fault.message
    path.write_bytes(b"no archive")
    assert "cannot be read: Not a gzipped file" in str(told(path))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["C"])), min_size=1))
def test_csv_reads_what_csv_writes(put: Put, delimiter: str, texts: list[str]) -> None:
    path = put("a.csv", "")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "quote"], *enumerate([*texts, "letters"])])
    assert values_of(path, "quote") == [*texts, "letters"]
    assert values_of(path, "id") == [str(number) for number in range(len(texts) + 1)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["C"], exclude_characters="\u2028\u2029\x85"), min_size=1)),
    st.sampled_from(["\n", "\r\n"]),
)
def test_csv_places_are_true_lines(put: Put, words: list[str], end: str) -> None:
    """Fields with line breaks in them: each record stands where an editor shows its first line."""
    texts = [f"{number} {word}{end * (number % 3)}{word}" for number, word in enumerate(words)]
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    path = put("a.csv", end.join(["text", *quoted]))
    lines = path.read_bytes().decode().split(end)
    for number, row in enumerate(read_file(path) if words else []):
        assert row.values == {"text": texts[number].replace("\r\n", "\n")}
        assert lines[row.location.number - 1].startswith(f'"{number} ')


def test_csv_places_are_the_lines_where_rows_begin(put: Put) -> None:
    path = put("a.csv", 'text\r\n"one\r\nand on"\r\n\r\ntwo\r\n' + "x" * 200_000)
    assert values_of(path) == ["one\nand on", "two", "x" * 200_000]
    assert places_of(path) == [2, 5, 6]
    assert csv.field_size_limit() == 131_072  # as it was


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"text": [*TEXTS, None], "n": range(6), "kind": pyarrow.array(list("aabbcc")).dictionary_encode()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert values_of(path) == [*TEXTS, None] and values_of(path, "kind") == list("aabbcc")
    assert places_of(path) == [1, 2, 3, 4, 5, 6]
    assert [row.values for row in read_file(path, columns=["n", "no.such"])] == [{"n": number} for number in range(6)]


@pytest.mark.parametrize("writer", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow_files_and_streams(tmp_path: Path, writer: Callable[..., Any]) -> None:
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"text": TEXTS * 300, "n": range(1500)})
    with writer(str(path), table.schema) as sink:
        for batch in table.to_batches(max_chunksize=400):
            sink.write(batch)
    assert values_of(path) == TEXTS * 300 and values_of(path, "n", columns=["n"]) == list(range(1500))
    assert values_of(path.rename(tmp_path / "rows")) == TEXTS * 300  # known by its first bytes


def test_classes_known_by_name_are_read_by_name(tmp_path: Path) -> None:
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["bad", "good"]),
        tags=datasets.List(datasets.ClassLabel(names=["O", "B"])),
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [], [1]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    assert values_of(path, "label") == ["good", "bad", None]
    assert values_of(path, "tags") == [["O", "B"], [], ["B"]]


def test_plain_text(put: Put) -> None:
    path = put("a.txt", "\ufeffOne.\r\nTwo.  \r\n")
    assert values_of(path) == ["One.", "Two."] and places_of(path) == [1, 2]
    path = put("a.txt", "\nOne,\ngoing on.\n \n\n\tTwo.\n")
    assert values_of(path) == ["One,\ngoing on.", "\tTwo."] and places_of(path) == [2, 6]
    path = put("a.txt", "\n\nOne.\nTwo.\n\n")  # blank lines around, none between
    assert values_of(path) == ["One.", "Two."] and places_of(path) == [3, 4]


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\nnonsense', {2: "column", 4: "not JSON"}),
        ("a.jsonl", '"a"\n{"text": "b"}\n"c"', {2: "holds dict, expected a string like the first"}),
        ("a.jsonl", '{"text": "a"}\n[1]\n7\nnull\n"x"', {2: "list", 3: "int", 4: "NoneType", 5: "holds str"}),
        ("a.jsonl", b'{"text": "a"}\n{"text": "na\xefve"}\n{"text": "\0"}\n', {2: "0xef is not UTF-8", 3: "zero byte"}),
        ("a.jsonl", "[" * 100_000, {1: "not JSON"}),
        ("a.jsonl", '{"n": ' + "1" * 5000 + "}", {1: "not JSON: Exceeds the limit"}),
        ("a.json", '[{"text": "a"}, 7, null]', {2: "holds int", 3: "holds NoneType"}),
        ("a.json", '[{"text": "a"},\n{"text": }]', {0: "not JSON: Expecting value: line 2"}),
        ("a.json", b'["a",\n"\xff"]', {0: "line 2: byte 0xff"}),
        ("a.json", '{"a": [], "b": []}', {0: "2 lists (a, b)"}),
        ("a.json", "17", {0: "holds int, expected a list"}),
        ("a.yaml", "- text: a\n- b\n-\n- [c]\n- text: d", {2: "str, expected a mapping", 3: "NoneType", 4: "list"}),
        ("a.yaml", "- text: a\n- n: 1\n  no: x\n- text: d", {2: "key 'no' is not text"}),
        (
            "a.yaml",
            "- text: a\n- [a]: x\n- {text: b, text: c}\n- !!map x",
            {2: "a key", 3: "'text' is given", 4: "mapping"},
        ),
        (
            "a.yaml",
            "- n: !!int ''\n- n: !!python/none\n- &a\n  text: [*a]",
            {1: "not a YAML", 2: "tag", 3: "recursive"},
        ),
        ("a.yaml", "- text: a\n- {text: b\n- text: c", {0: "line 3: not YAML"}),
        ("a.yaml", "- text: a\u2028\n- text: \x01", {0: "line 2: not YAML: character U+0001"}),
        ("a.yaml", "- text: a\n" + "[" * 100_000, {0: "line 2: "}),
        ("a.yaml", b"- text: a\n- text: \xff", {0: "line 2: byte 0xff"}),
        ("a.yaml", "- text: a\n---\n- text: b", {0: "line 2: not YAML: expected one document, found a second one"}),
        ("a.yaml", "base:\n  model: x", {0: "holds a mapping, expected a list of mappings"}),
        ("a.yaml", "nothing but prose", {0: "holds a single value, expected a list"}),
        ("a.csv", "id,text\n1,a\n2,b, c\n3\n4,d", {3: "3 fields, expected 2", 4: "1 field, expected 2"}),
        ("a.csv", 'text\nfine\n"left open\nfor ever', {3: "not CSV"}),
        ("a.csv", 'text,n\n"a "b" c",1\nd,2', {2: "not CSV"}),
        ("a.csv", b"text,n\na,1\n\xe9,2\n", {3: "byte 0xe9 is not UTF-8"}),
        ("a.csv", b"te\xe9,n\na,1\n", {0: "byte 0xe9 is not UTF-8"}),
        ("a.csv", 'te"xt,"n\n', {0: "line 1: not CSV"}),
        ("a.csv", "text,text\na,b", {0: "same name twice"}),
        ("a.parquet", "no parquet at all", {0: "cannot be read as parquet"}),
        ("a.arrow", "no arrow at all", {0: "cannot be read as arrow"}),
        ("a.txt", "fine\nna\xefve\nfine".encode("latin-1"), {2: "byte 0xef is not UTF-8"}),
        ("a.txt", "fine".encode("utf-16-le"), {0: "UTF-16 without a byte order mark"}),
        ("a.txt", b"fine\n\0", {2: "zero byte"}),
        ("a.txt", b"fine\n%\n\xff\n%\nfine", {3: "byte 0xff"}),
        ("a.txt", b"", {0: "empty, no row"}),
        ("a.txt", " \n\n", {0: "empty"}),
        ("a.json", "", {0: "empty"}),
        ("a.json", "[]", {0: "empty"}),
        ("a.yaml", "# no row\n", {0: "empty"}),
        ("a.yaml", "[]", {0: "empty"}),
        ("a.jsonl", "\n", {0: "empty"}),
        ("a.csv", "", {0: "empty"}),
        ("a.csv", "text\n", {0: "empty"}),
        ("a.txt", "%\n%\n", {0: "empty, no quotation"}),
    ],
)
def test_what_is_broken_is_told_and_the_rest_is_read(
    put: Put, name: str, content: str | bytes, faults: dict[int, str]
) -> None:
    path = put(name, content)
    rows = list(read_file(path))
    assert [row.location.number for row in rows if row.values is None] == list(faults)
    assert [row.location.number for row in rows if row.fault is not None] == list(faults)
    for row in rows:
        assert row.location.source == str(path)
        if row.fault is not None:
            assert faults[row.location.number] in row.fault.message and "\n" not in row.fault.message


def test_the_rest_of_a_broken_file(put: Put) -> None:
    texts = [row.values["text"] for row in read_file(put("a.csv", 'text,n\n"a "b" c",1\nd,2')) if row.values]
    assert texts == ["d"]
    texts = [row.values["text"] for row in read_file(put("a.jsonl", 'nonsense\n{"text": "d"}')) if row.values]
    assert texts == ["d"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=200) | st.text(st.sampled_from("{}[]\"\\',;\t\n\r%a1: é\ufeff"), max_size=80),
    name=st.sampled_from(["a.json", "a.jsonl", "a.yaml", "a.csv", "a.txt", "a", "a.parquet", "a.arrow", "a.csv.gz"]),
)
def test_nothing_at_all_stops_the_reading(put: Put, content: str | bytes, name: str) -> None:
    lines = (content.encode() if isinstance(content, str) else content).replace(b"\r", b"\n").count(b"\n") + 1
    rows = list(read_file(put(name, content)))
    assert rows
    for row in rows:
        assert (row.values is None) == (row.fault is not None)
        assert row.location.unit == "row" or row.location.number <= lines


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    for format in ("auto", "csv", "parquet"):
        (row,) = read_file(tmp_path, format)
        assert row.location.number == 0 and row.fault is not None and "cannot be read" in row.fault.message


def test_format_can_be_given(put: Put) -> None:
    path = put("a.dump", '{"text": "a"}\n')
    assert values_of(path, format="text") == ['{"text": "a"}']
    assert values_of(path, format="jsonl") == ["a"]


def test_a_location_as_text() -> None:
    assert str(Location("quotes.jsonl", 12)) == "quotes.jsonl:12"
    assert Location("quotes.parquet", 12, "row").phrase == "quotes.parquet, row 12"
    assert str(Location("quotes.jsonl")) == Location("quotes.jsonl").phrase == "quotes.jsonl"


def test_many_locations_are_kept_in_little_memory_and_come_back_whole() -> None:
    known = [
        Location("a.jsonl", 3),
        Location("b.parquet", 2**40, "row"),
        Location("a.jsonl", 1),
        Location("a.jsonl", 0),
    ]
    locations = Locations(known)
    assert list(locations) == known and len(locations) == 4 and locations[1] == known[1] and locations[-1] == known[3]
    assert list(locations.select([2, 0])) == [known[2], known[0]] and list(locations[1:3]) == known[1:3]
    more = locations.select([1])
    more.append(Location("c.csv", 7))
    assert list(more) == [known[1], Location("c.csv", 7)] and list(locations) == known
    more.extend(locations)
    assert list(more) == [known[1], Location("c.csv", 7), *known]
