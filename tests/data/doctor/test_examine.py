"""Every planted defect is found: its kind, its count, its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.cli import main
from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor.diagnosis import Examination
from lorakeet.data.doctor.examine import examine
from lorakeet.data.doctor.examiner import examine_rows
from lorakeet.data.rows.load import read_rows

WORDS = ("amber birch cedar dune ember fjord grove heath islet juniper knoll lagoon marsh nook oasis").split()  # noqa: SIM905


def sentence(number: int) -> str:
    return f"{WORDS[number % 15]} {WORDS[number * 7 % 13]} number {number} by the {WORDS[number * 11 % 14]}"


def turns(*pairs: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in (pair.split(":", 1) for pair in pairs)]


#: Task -> a healthy row by its number.
HEALTHY: dict[str, Any] = {
    "text": lambda n: {"text": sentence(n)},
    "chat": lambda n: {"messages": turns(f"user:{sentence(n)}?", f"assistant:{sentence(n)}.")},
    "completion": lambda n: {"prompt": f"{sentence(n)}? ", "completion": sentence(n)},
    "classes": lambda n: {"text": sentence(n), "label": ("tree", "water")[n % 2]},
    "tags": lambda n: {"tokens": sentence(n).split(), "tags": [("A", "B")[n % 2]] * len(sentence(n).split())},
    "question": lambda n: {
        "question": f"which number, {n}?",
        "context": sentence(n),
        "answers": {"text": [str(n)], "answer_start": [sentence(n).index(str(n))]},
    },
    "translation": lambda n: {"source": sentence(n), "target": sentence(n)[::-1]},
}
TASKS = {"classes": "SEQ_CLS", "tags": "TOKEN_CLS", "question": "QUESTION_ANS", "translation": "SEQ_2_SEQ_LM"}
TEN = sentence(10)

#: A kind of data, a record put in as the 11th (text: as it is; None: nothing is put in), the problem that it is.
PLANTED: list[tuple[str, Any, str]] = [
    ("text", '{"text": "half', "broken"),
    ("text", '["a list"]', "broken"),
    ("text", b'{"text": "caf\xe9 au lait"}', "encoding"),
    ("text", {"text": 7}, "wrong_type"),
    ("text", {"text": ["a", "b"]}, "wrong_type"),
    ("text", {"text": ""}, "empty"),
    ("text", {"text": "  \t "}, "empty"),
    ("text", {"text": None}, "null"),
    ("text", {"txet": "words here"}, "misspelt_column"),
    ("text", {"text": sentence(3)}, "duplicate"),
    ("text", {"text": sentence(3).upper() + " "}, "near_duplicate"),
    ("text", '{"text": "half a \\ud83d smile"}', "half_character"),
    ("text", {"text": "lost \ufffd here"}, "lost_character"),
    ("text", {"text": "the cafÃ© is open"}, "mojibake"),
    ("text", {"text": "a bell \x07 rings"}, "control"),
    ("text", {"text": "again and " * 200}, "repetitive"),
    ("chat", {"messages": turns("usr:one?", "assistant:two.")}, "role"),
    ("chat", {"messages": turns("user:one?", "user:two?", "assistant:three.")}, "turns"),
    ("chat", {"messages": turns("user:one?", "assistant:two.", "user:thanks")}, "last_turn"),
    ("chat", {"messages": turns("user:one?", "assistant:")}, "empty_turn"),
    ("chat", {"messages": "user: hello"}, "wrong_type"),
    ("completion", {"prompt": "one two three? ", "completion": ""}, "empty"),
    ("completion", {"prompt": "one two three? "}, "null"),
    ("completion", {"prompt": f"{sentence(3)}? ", "completion": sentence(3)}, "duplicate"),
    ("classes", {"text": "a new text", "label": None}, "null"),
    ("classes", {"text": sentence(4), "label": "water"}, "conflict"),
    ("classes", {"text": "a new text", "label": "Water"}, "label_spelling"),
    ("classes", {"text": "a new text", "label": {"name": "water"}}, "wrong_type"),
    ("tags", {"tokens": ["one", "two"], "tags": ["A"]}, "tag_count"),
    ("tags", {"tokens": ["one", ""], "tags": ["A", "B"]}, "empty_word"),
    (
        "question",
        {"question": "what?", "context": "all is well", "answers": {"text": ["well"], "answer_start": [3]}},
        "answer_place",
    ),
    ("question", {"question": "", "context": "all is well", "answers": {"text": [], "answer_start": []}}, "empty"),
    ("translation", {"source": "", "target": "reversed"}, "empty"),
]


def write(path: Path, kind: str, planted: Any, rows: int = 40, at: int = 10) -> Path:
    lines = [json.dumps(HEALTHY[kind](number)).encode() for number in range(rows)]
    if isinstance(planted, dict):
        planted = json.dumps(planted)
    lines.insert(at, planted if isinstance(planted, bytes) else planted.encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def look(path: Path, kind: str, **more: Any) -> Examination:
    task = TaskSettings(type=TASKS.get(kind, "CAUSAL_LM"), **more)
    return examine(DataSettings(path=str(path)), task)


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_data_is_said_to_be(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", kind, HEALTHY[kind](99))
    found = look(path, kind)
    assert not list(found.issues) and found.rows == found.usable == 41 and "healthy" in found.lines()[-1]


@pytest.mark.parametrize(("kind", "planted", "problem"), PLANTED, ids=[f"{row[0]}-{row[2]}" for row in PLANTED])
def test_a_planted_defect_is_found_where_it_is(kind: str, planted: Any, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", kind, planted)
    found = look(path, kind)
    told = {finding.code: finding for finding in found.issues}
    assert problem in told, told
    assert told[problem].count == 1
    assert str(told[problem].first[0]).startswith(f"{path}:11:"), str(told[problem].first[0])
    assert not told.keys() - {problem, "imbalance"}
    assert found.rows == 41


@given(st.sets(st.integers(0, 39), max_size=12), st.sampled_from(["", "not json", None, "café"]))
@settings(max_examples=30, deadline=None)
def test_any_number_of_defects_at_any_lines(tmp_path_factory: pytest.TempPathFactory, places, what) -> None:
    path = tmp_path_factory.mktemp("wild") / "rows.jsonl"
    bad = {"": '{"text": ""}', "not json": "nonsense", None: '{"text": null}', "café": '{"text": "cafÃ© %d"}'}[what]
    problem = {"": "empty", "not json": "broken", None: "null", "café": "mojibake"}[what]
    lines = [json.dumps(HEALTHY["text"](number)) for number in range(40)]
    for place in places:
        lines[place] = bad.replace("%d", str(place))
    path.write_text("\n".join(lines), encoding="utf-8")
    found = look(path, "text")
    assert found.count(problem) == len(places)
    spots = next((finding.first for finding in found.issues if finding.code == problem), [])
    assert [spot.location.number for spot in spots] == sorted(place + 1 for place in places)[:3]


def test_the_same_in_csv_and_parquet(tmp_path: Path) -> None:
    rows = [{"text": sentence(number), "label": ("tree", "water")[number % 2]} for number in range(40)]
    rows[7] = {"text": "", "label": "tree"}
    rows[9] = dict(rows[3])
    csv = tmp_path / "rows.csv"
    csv.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows), encoding="utf-8")
    parquet = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    for path, first in ((csv, 2), (parquet, 1)):  # lines below a header; rows
        found = look(path, "classes")
        told = {finding.code: [spot.location.number for spot in finding.first] for finding in found.issues}
        assert told == {"empty": [7 + first], "duplicate": [9 + first]}, path


def test_labels_that_are_rare_unknown_or_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "classes", {"text": "a new text", "label": "stone"})
    assert look(path, "classes").count("imbalance") == 1
    unknown = look(path, "classes", labels=["tree", "water"])
    assert unknown.count("label_unknown") == 1 and unknown.stops
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(json.dumps({"text": sentence(n), "label": "tree"}) + "\n" for n in range(9)))
    assert look(alone, "classes").count("one_label") == 1


@pytest.mark.parametrize(
    "labels", [[f"class {n}" for n in range(40)], list(range(40)), [n // 2 or n for n in range(12)]]
)
def test_labels_that_each_row_has_alone_are_no_classes(labels: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(n), "label": one}) + "\n" for n, one in enumerate(labels)))
    found = look(path, "classes")
    assert found.count("own_label") == int(len(labels) == 40) and not found.stops
    assert not look(path, "classes", labels=[str(label) for label in labels]).count("own_label")
    settings = DataSettings(path=str(path))
    assert not examine(settings, TaskSettings(type="SEQ_CLS", problem="regression")).count("own_label")


def test_labels_beyond_count_and_fractions(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(n), "label": f"text {n}"}) + "\n" for n in range(1100)))
    assert look(path, "classes").stops and look(path, "classes").count("many_labels") == 1
    path.write_text("".join(json.dumps({"text": sentence(n), "label": n / 7}) + "\n" for n in range(1100)))
    assert not look(path, "classes").issues


@pytest.mark.parametrize("missing", ["NaN", "nan", "<NA>", "", "null", " "])
def test_a_label_that_is_missing_is_no_class(missing: str, tmp_path: Path) -> None:
    for first, other in (("1", "0"), ("0.5", "0.25"), ("tree", "water")):
        path = tmp_path / "rows.csv"
        labels = [first, other] * 4 + [missing]
        path.write_text("text,label\n" + "".join(f"{sentence(n)},{label}\n" for n, label in enumerate(labels)))
        found = look(path, "classes")
        assert (found.rows, found.usable, found.count("null")) == (9, 8, 1)
        assert set(found.labels) == {float(first), float(other)} if first != "tree" else {"tree", "water"}


@pytest.mark.parametrize(("task", "column"), [("SEQ_CLS", "text_pair"), ("FEATURE_EXTRACTION", "negative")])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_of_a_source_without_a_column_that_others_have(
    task: Any, column: str, order: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"text": "a", "label": 0} if task == "SEQ_CLS" else {"anchor": "a", "positive": "b"}
    first = next(iter(row))
    paths = [tmp_path / "with.jsonl", tmp_path / "without.jsonl"]
    for number, path in enumerate(paths):
        more = {column: "a second text"} if number == 0 else {}
        rows = [
            {**row, first: sentence(n + 20 * number), **more, **({"label": n % 2} if "label" in row else {})}
            for n in range(8)
        ]
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    settings = DataSettings(path=[str(paths[at]) for at in order])
    found = examine(settings, TaskSettings(type=task))
    read = examine_rows(read_rows(settings, task), TaskSettings(type=task), settings)
    assert found.usable == len(read.usable) == 8 and found.count("null") == read.issues.count("null") == 8
    assert f"without.jsonl has no column of {column}" in caplog.text


def test_rows_of_the_test_file_that_are_learned(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "text", HEALTHY["text"](77))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": sentence(77)}) + "\n" + json.dumps({"text": "new"}) + "\n")
    found = look(tmp_path, "text")
    assert found.count("both_sides") == 1 and found.rows == 41


def test_columns_that_make_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "lable": 3}\n{"text": "two", "lable": 4}\n')
    found = examine(DataSettings(path=str(path)), TaskSettings(type="SEQ_CLS"))
    assert found.stops and found.count("columns") == 1 and "lable" in found.issues[0].first[0].message


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", "text", "nonsense")
    picture = tmp_path / "lengths.png"
    assert main(["doctor", str(path), "--json", "--plot", str(picture)]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["stops"] and told["rows"] == 41 and told["findings"][0]["kind"] == "broken"
    assert picture.read_bytes().startswith(b"\x89PNG")
    path = write(tmp_path / "rows.jsonl", "text", {"text": ""})
    assert main(["doctor", str(path)]) == 0
    assert f"{path}:11" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
