"""What is planted is mended or left out, the doctor finds it no more, and what is whole stays as it was."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.cli import main
from lorakeet.config import DataSettings, TaskName, TaskSettings
from lorakeet.data.doctor.examine import examine
from lorakeet.data.doctor.fix import Repaired, repair
from lorakeet.data.rows.load import read_rows
from lorakeet.errors import DataError, OutputError

Rows = list[dict[str, Any]]


def sentence(number: int) -> str:
    return f"the {('amber', 'birch', 'cedar', 'dune', 'ember')[number % 5]} by the lake, number {number}"


def turns(*pairs: str) -> Rows:
    return [{"role": role, "content": content} for role, content in (pair.split(":", 1) for pair in pairs)]


def question(number: int, context: str = "in 1887 the tower was begun", answer: str = "1887", start: int = 3) -> Any:
    answers = {"text": [answer], "answer_start": [start]}
    return {"question": f"when, {number}?", "context": f"{context} ({number})", "answers": answers}


#: A kind of data -> a healthy row by its number, and the task.
HEALTHY: dict[str, tuple[Any, TaskName]] = {
    "text": (lambda n: {"text": sentence(n), "id": n}, "CAUSAL_LM"),
    "chat": (lambda n: {"messages": turns(f"user:{sentence(n)}?", f"assistant:{n}.")}, "CAUSAL_LM"),
    "shared": (
        lambda n: {"conversations": [{"from": "human", "value": sentence(n)}, {"from": "gpt", "value": f"{n}."}]},
        "CAUSAL_LM",
    ),
    "json": (lambda n: {"messages": json.dumps(turns(f"user:{n}?", f"assistant:{sentence(n)}"))}, "CAUSAL_LM"),
    "parts": (
        lambda n: {"prompt": turns(f"user:{n}?"), "completion": turns(f"assistant:{sentence(n)}")},
        "CAUSAL_LM",
    ),
    "classes": (lambda n: {"text": sentence(n), "label": ("tree", "water")[n % 2]}, "SEQ_CLS"),
    "numbers": (lambda n: {"text": sentence(n), "label": n % 2}, "SEQ_CLS"),
    "digits": (lambda n: {"text": sentence(n), "label": str(n % 2)}, "SEQ_CLS"),
    "several": (lambda n: {"text": sentence(n), "label": [["tree"], ["tree", "water"], []][n % 3]}, "SEQ_CLS"),
    "tags": (lambda n: {"tokens": [*sentence(n).split()[:5], str(n)], "tags": ["B-PLACE", "O"] * 3}, "TOKEN_CLS"),
    "question": (question, "QUESTION_ANS"),
}

#: Kind of data, record, the problem, and what becomes of the record.
MENDED: list[tuple[str, Any, str, Any]] = [
    ("text", {"text": "the cafÃ© is open"}, "mojibake", {"text": "the café is open"}),
    ("text", {"text": "a bell \x07 rings\ufeff"}, "control", {"text": "a bell  rings"}),
    ("text", {"text": "half a \ud83d smile"}, "half_character", {"text": "half a \ufffd smile"}),
    ("text", {"text": "fine", "note": ["cafÃ©"]}, "mojibake", {"text": "fine", "note": ["café"]}),
    ("text", {"txet": "words here", "id": 3}, "misspelt_column", {"text": "words here", "id": 3}),
    ("text", {"tex_t": "wÃ¶rds"}, "misspelt_column", {"text": "wörds"}),
    (
        "chat",
        {"messages": turns("usr:one?", "Asistant:two.")},
        "role",
        {"messages": turns("user:one?", "assistant:two.")},
    ),
    ("chat", {"messages": turns("human:one?", "bot:two.")}, "role", {"messages": turns("user:one?", "assistant:two.")}),
    (
        "chat",
        {"messages": turns("user:one?", "assistant:two.", "user:thanks", "tool:x")},
        "last_turn",
        {"messages": turns("user:one?", "assistant:two.")},
    ),
    (
        "chat",
        {"messages": [{"role": "user", "contnet": "one?"}, {"role": "assistant", "content": "zwÃ¶lf"}]},
        "misspelt_column",
        {"messages": turns("user:one?", "assistant:zwölf")},
    ),
    (
        "chat",
        {"messages": [{"Role": "user", "content": "one?"}, *turns("assistant:two.")]},
        "misspelt_column",
        {"messages": turns("user:one?", "assistant:two.")},
    ),
    (
        "shared",
        {"conversations": [{"from": "Human ", "value": "one?"}, {"from": "gpt", "vlaue": "two."}]},
        "role",
        {"conversations": [{"from": "user", "value": "one?"}, {"from": "gpt", "value": "two."}]},
    ),
    (
        "json",
        {"messages": json.dumps(turns("user:zwÃ¶lf\x07?", "assistant:two.", "user:bye"))},
        "last_turn",
        {"messages": json.dumps(turns("user:zwölf?", "assistant:two."), ensure_ascii=False)},
    ),
    (
        "parts",
        {"prompt": turns("human:one?"), "completion": turns("assistant:two.", "user:thanks")},
        "role",
        {"prompt": turns("user:one?"), "completion": turns("assistant:two.")},
    ),
    ("classes", {"text": "new", "label": "Water "}, "label_spelling", {"text": "new", "label": "water"}),
    ("classes", {"text": "new", "lable": "WATER"}, "label_spelling", {"text": "new", "label": "water"}),
    (
        "several",
        {"text": "new", "label": ["Tree", "water"]},
        "label_spelling",
        {"text": "new", "label": ["tree", "water"]},
    ),
    (
        "tags",
        {"tokens": ["cafÃ©", "b"], "tags": ["b_place", "O"]},
        "label_spelling",
        {"tokens": ["café", "b"], "tags": ["B-PLACE", "O"]},
    ),
    ("numbers", {"text": "new", "label": "1"}, "wrong_type", {"text": "new", "label": 1}),
    ("digits", {"text": "new", "label": 1}, "wrong_type", {"text": "new", "label": "1"}),
    ("question", question(99, start=5), "answer_place", question(99)),
    (
        "question",
        question(99, "cafÃ© 1887 1887", "1887", 6),
        "mojibake",
        question(99, "café 1887 1887", "1887", 5),
    ),
]

#: Kind of data, record as it stands in the file, why it is left out.
LEFT_OUT: list[tuple[str, Any, str]] = [
    ("text", '{"text": "half', "broken"),
    ("text", b'{"text": "caf\xe9 au lait"}', "encoding"),
    ("text", {"text": " "}, "empty"),
    ("text", {"text": "\x07"}, "empty"),
    ("text", {"text": None}, "null"),
    ("text", {"text": sentence(3)}, "duplicate"),
    ("classes", {"text": sentence(3), "label": "Water"}, "duplicate"),
    ("classes", {"text": "new", "label": None}, "null"),
    ("chat", {"messages": turns("user:one?", "user:two?")}, "nothing_learned"),
    ("parts", {"prompt": turns("assistant:one?"), "completion": turns("user:two?")}, "nothing_learned"),
]

#: Kind of data, record, the problem: a person decides.
UNCERTAIN: list[tuple[str, Any, str]] = [
    ("text", {"text": 7}, "wrong_type"),
    ("text", {"text": "lost \ufffd here"}, "lost_character"),
    ("text", {"texsst": "words"}, "misspelt_column"),
    ("text", {"text": sentence(3).upper()}, "near_duplicate"),
    ("text", {"text": "again and " * 200}, "repetitive"),
    ("chat", {"messages": turns("moderator:one?", "assistant:two.")}, "role"),
    ("chat", {"messages": turns("user:one?", "assistant:two.", "moderator:three.")}, "role"),
    ("chat", {"messages": turns("user:one?", "user:two?", "assistant:three.")}, "turns"),
    ("chat", {"messages": "user: hello"}, "wrong_type"),
    ("chat", {"messages": [{"role": "user", "context": "one?"}, *turns("assistant:two.")]}, "misspelt_column"),
    ("classes", {"text": sentence(4), "label": "water"}, "conflict"),
    ("classes", {"text": "new", "label": "trees"}, "label_spelling"),
    ("tags", {"tokens": ["one", "two"], "tags": ["O"]}, "tag_count"),
    ("tags", {"tokens": ["one", "\x07"], "tags": ["O", "O"]}, "control"),
    ("question", question(99, "a b a", "a", 2), "answer_place"),
]


def write(path: Path, kind: str, planted: Any, rows: int = 40, at: int = 10) -> Path:
    lines = [json.dumps(HEALTHY[kind][0](number)).encode() for number in range(rows)]
    if isinstance(planted, dict):
        planted = json.dumps(planted)
    lines.insert(at, planted if isinstance(planted, bytes) else planted.encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fix(path: Path, kind: str, **more: Any) -> tuple[Repaired, Rows]:
    out = path.parent / "out" / "fixed.jsonl"
    done = repair(DataSettings(path=str(path)), TaskSettings(type=HEALTHY[kind][1], **more), out, overwrite=True)
    return done, read(out)


def told(findings: Any) -> dict[str, int]:
    return {finding.kind: finding.count for finding in findings if finding.kind != "imbalance"}


def found(path: Path, kind: str) -> dict[str, int]:
    return told(examine(DataSettings(path=str(path)), TaskSettings(type=HEALTHY[kind][1])).findings)


@pytest.mark.parametrize("kind", HEALTHY)
def test_what_is_whole_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", kind, HEALTHY[kind][0](99))
    done, rows = fix(path, kind)
    assert rows == read(path) and done.written == done.read == 41
    assert not done.mended and not done.left_out and not done.stops and "nothing was mended" in done.lines()


@pytest.mark.parametrize(("kind", "planted", "problem", "whole"), MENDED, ids=[f"{row[0]}-{row[2]}" for row in MENDED])
def test_what_is_certain_is_mended(kind: str, planted: Any, problem: str, whole: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", kind, planted)
    assert found(path, kind) or "note" in planted  # the doctor does not look at columns that nobody uses
    done, rows = fix(path, kind)
    assert rows == [*read(path)[:10], whole, *read(path)[11:]]
    assert told(done.mended)[problem] == 1
    spot = next(finding.first[0] for finding in done.mended if finding.kind == problem)
    assert str(spot).startswith(f"{path}:11: ")
    assert not done.left_out and told(done.remains.findings).keys() <= {"lost_character"}
    assert found(done.path, kind) == told(done.remains.findings)


@pytest.mark.parametrize(("kind", "planted", "problem"), LEFT_OUT, ids=[f"{row[0]}-{row[2]}" for row in LEFT_OUT])
def test_what_teaches_nothing_is_left_out(kind: str, planted: Any, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", kind, planted)
    done, rows = fix(path, kind)
    assert rows == [HEALTHY[kind][0](number) for number in range(40)] and done.written == 40 and done.read == 41
    assert told(done.left_out) == {problem: 1} and not done.mended
    assert str(done.left_out[0].first[0]).startswith(f"{path}:11: ")
    assert not found(done.path, kind)


@pytest.mark.parametrize(("kind", "planted", "problem"), UNCERTAIN, ids=[f"{row[0]}-{row[2]}" for row in UNCERTAIN])
def test_what_is_not_certain_stays_and_is_told(kind: str, planted: Any, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", kind, planted)
    done, rows = fix(path, kind)
    assert rows == read(path) and not done.mended and not done.left_out
    assert told(done.remains.findings) == {problem: 1} == found(path, kind)
    assert str(done.remains.findings[0].first[0]).startswith(f"{done.path}:11:")
    assert done.stops == (problem in ("wrong_type", "role", "tag_count", "answer_place"))


def test_labels_are_written_as_they_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "classes", {"text": "new", "label": "WATER"})
    done, rows = fix(path, "classes", labels=["Tree", "Water", "stone"])
    assert {row["label"] for row in rows} == {"Tree", "Water"} and not told(done.remains.findings)
    done, rows = fix(path, "classes", labels=["tree", "water", "Water"])  # WATER may be either
    assert rows == read(path) and told(done.remains.findings) == {"label_unknown": 1}


def test_a_letter_is_a_label_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": sentence(n), "label": "AaBb"[n % 4]} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert fix(path, "classes")[1] == rows


def test_a_column_that_whole_rows_have_is_not_misspelt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"quote": sentence(n), "quotes": "a number"} for n in range(9)] + [{"quotes": "words"}]
    path.write_text("\n".join(map(json.dumps, [*rows, {"quote": " ", "qoute": "words"}, {"qoute": "others"}])))
    done = repair(DataSettings(path=str(path), columns={"text": "quote"}), TaskSettings(), tmp_path / "o.jsonl")
    assert read(done.path) == [*rows, {"quote": "others"}]  # a row that is left out does not count
    assert told(done.remains.findings) == {"misspelt_column": 1}


def test_nothing_is_cut_where_all_turns_are_learned(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "chat", {"messages": turns("user:one?", "assistant:two.", "user:three")})
    done = repair(DataSettings(path=str(path), learn="all"), TaskSettings(), tmp_path / "o.jsonl")
    assert read(done.path) == read(path) and told(done.remains.findings) == {"last_turn": 1}


def test_rows_of_the_test_file_are_not_learned(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", "text", {"text": "  A row that is MEASURED"})
    (tmp_path / "test.jsonl").write_text('{"text": "a row that is measured"}\n')
    done = repair(DataSettings(path=str(path)), TaskSettings(), tmp_path / "fixed.jsonl")
    assert told(done.left_out) == {"both_sides": 1} and not done.remains.findings and done.written == 40
    again = repair(DataSettings(path=str(tmp_path / "test.jsonl")), TaskSettings(), tmp_path / "test-fixed.jsonl")
    assert (
        repair(
            DataSettings(path=str(tmp_path / "test.jsonl")),
            TaskSettings(),
            tmp_path / "test-fixed.jsonl",
            overwrite=True,
        ).written
        == again.written
        == 1
    )  # an earlier copy is no other side


@pytest.mark.parametrize("format", ["csv", "parquet", "json", "txt", "fortune"])
def test_other_formats_become_json_lines_that_teach_the_same(format: str, tmp_path: Path) -> None:
    path, task = tmp_path / f"rows.{format}", "SEQ_CLS"
    rows: Rows = [{"words": sentence(n), "label": n % 3, "score2": n / 4, "zip": f"0{n}"} for n in range(60)]
    if format == "csv":
        head = ",".join(rows[0])
        path.write_text(head + "\n" + "".join(",".join(f'"{v}"' for v in row.values()) + "\n" for row in rows))
    elif format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif format == "json":
        path.write_text(json.dumps({"train": rows}))
    else:
        task = "CAUSAL_LM"
        path.write_text(("\n%\n" if format == "fortune" else "\n\n").join(row["words"] for row in rows))
    out, columns = tmp_path / "o.jsonl", {"text": "words"} if task == "SEQ_CLS" else {}
    given = DataSettings(path=str(path), columns=columns)
    assert not repair(given, TaskSettings(type=task), out).remains.findings
    before, after = (read_rows(given.model_copy(update={"path": str(p)}), task).data for p in (path, out))
    assert before.features == after.features and before.to_list() == after.to_list() and len(after) == 60
    if task == "SEQ_CLS":
        assert read(out) == rows


def test_numbers_of_a_csv_file_that_are_not_all_numbers_stay_words(tmp_path: Path) -> None:
    path, out = tmp_path / "rows.csv", tmp_path / "o.jsonl"
    path.write_text(
        "text,label\n" + "".join(f"{sentence(n)!r},{n % 2}\n".replace("'", '"') for n in range(1500)) + "last,none\n"
    )
    repair(DataSettings(path=str(path)), TaskSettings(type="SEQ_CLS"), out)
    before, after = (read_rows(DataSettings(path=str(p)), "SEQ_CLS").data["label"][:] for p in (path, out))
    assert before == after and set(after) == {"0", "1", "none"}


def test_no_number_in_a_table_becomes_null(tmp_path: Path) -> None:
    path, out = tmp_path / "rows.parquet", tmp_path / "o.jsonl"
    pq.write_table(pa.table({"text": ["one", "two"], "n": [1.5, float("nan")]}), path)
    repair(DataSettings(path=str(path)), TaskSettings(), out)
    assert read(out) == [{"text": "one", "n": 1.5}, {"text": "two", "n": None}] and "NaN" not in out.read_text()


def test_several_files_become_one_if_their_columns_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    write(folder / "a.jsonl", "text", {"text": "only here"})
    write(folder / "b.jsonl", "text", {"text": "only there"})
    done = repair(DataSettings(path=str(folder)), TaskSettings(), tmp_path / "o.jsonl")
    assert done.read == 82 and done.written == 42 and told(done.left_out) == {"duplicate": 40}
    (folder / "b.jsonl").write_text('{"quote": "only there"}\n')
    with pytest.raises(DataError, match=r"other columns for text: one file cannot hold both"):
        repair(DataSettings(path=str(folder)), TaskSettings(), tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()


def test_a_file_that_breaks_off_is_for_a_person(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(20_000))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-2000])
    done = repair(DataSettings(path=str(path)), TaskSettings(), tmp_path / "o.jsonl")
    assert told(done.left_out)["unreadable"] == 1 and done.stops and not done.remains.stops and done.written > 1000


def test_a_limit_counts_rows_that_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "text", "broken")
    done = repair(DataSettings(path=str(path), limit=20), TaskSettings(), tmp_path / "o.jsonl")
    assert done.read == 20 and done.written == 19


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "text", "broken")
    before = path.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    for out, complaint in {
        path: "is the data itself",
        link: "is the data itself",
        tmp_path / "there.jsonl": "exists",
        tmp_path / "folder.jsonl": "is a folder",
        tmp_path / "o.csv": "JSON lines",
    }.items():
        with pytest.raises(OutputError, match=complaint):
            repair(DataSettings(path=str(path)), TaskSettings(), out)
    with pytest.raises(OutputError, match="whose files are the data"):
        repair(DataSettings(path=str(tmp_path)), TaskSettings(), tmp_path / "inner" / "o.jsonl")
    with pytest.raises(OutputError, match="is the data itself"):
        repair(DataSettings(path=str(path)), TaskSettings(), path, overwrite=True)
    assert path.read_bytes() == before and (tmp_path / "there.jsonl").read_text() == "mine"


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write(tmp_path / "in.jsonl", "text", "broken"), tmp_path / "out" / "o.jsonl"
    out.parent.mkdir()
    out.write_text("the old one")

    def stopped(rows: int) -> None:
        raise KeyboardInterrupt

    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(2000)))
    with pytest.raises(KeyboardInterrupt):
        repair(DataSettings(path=str(long)), TaskSettings(), out, overwrite=True, progress=stopped)
    path.write_text('{"text": " "}\n' * 3)
    with pytest.raises(DataError, match="nothing is left of 3 rows"):
        repair(DataSettings(path=str(path)), TaskSettings(), out, overwrite=True)
    assert [file.name for file in out.parent.iterdir()] == ["o.jsonl"] and out.read_text() == "the old one"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "rows.jsonl", "text", "nonsense"), tmp_path / "o.jsonl"
    assert main(["doctor", str(path), "--fix", str(out)]) == 0
    said = capsys.readouterr().out
    assert "a run would stop" in said and "left out   1 records that cannot be read" in said and "healthy" in said
    assert main(["doctor", str(path), "--fix", str(out)]) == 2
    assert f"{out} exists" in capsys.readouterr().err
    write(path, "text", {"text": 7})
    assert main(["doctor", str(path), "--fix", str(out), "--overwrite", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)["repaired"]
    assert report["written"] == 41 and report["stops"] and report["remains"][0]["kind"] == "wrong_type"
    assert main(["doctor", str(path), "--fix", str(path)]) == 2
    assert "is the data itself" in capsys.readouterr().err


whole = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1).filter(str.strip)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | whole, lambda inner: st.lists(inner) | st.dictionaries(whole, inner)
)


@given(st.lists(st.fixed_dictionaries({"text": whole, "more": values}), min_size=1, unique_by=lambda row: row["text"]))
@settings(max_examples=25, deadline=None)
def test_rows_without_defects_come_out_identical(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> None:
    folder = tmp_path_factory.mktemp("wild")
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    done = repair(DataSettings(path=str(path), columns={"text": "text"}), TaskSettings(), folder / "o.jsonl")
    assert read(done.path) == rows and not done.mended and not done.left_out


signs = st.sampled_from(
    ["a", " ", "Ã", "©", "\x07", "\x83", "\ufeff", "\ud83d", "\ude00", "â", "€", "™", "Â", "\xa0", "\n", "é"]
)
dirty = st.lists(signs, max_size=8).map("".join)
message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "Human", "sytem", "x"]),
        "content": dirty,
        "contnet": dirty,
        "from": st.just("gpt"),
    },
)
several = st.lists(message, max_size=4)
chats = st.fixed_dictionaries({}, optional={"messages": several | several.map(json.dumps), "n": dirty})
lost_chats = st.fixed_dictionaries({"mesages": several}, optional={"n": dirty})
label = st.sampled_from(["one", "One", "ONE ", "two", "tow", "1", 1, None])
classes = st.fixed_dictionaries({}, optional={"text": dirty, "label": label})
lost_classes = st.fixed_dictionaries({"txet": dirty}, optional={"label": label})


def with_both(kind: str, name: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Whole rows with a column of a similar name besides. None repeats another: left out, it would not speak for that."""
    return st.builds(lambda number, more: {**HEALTHY[kind][0](number), name: more}, st.integers(100, 10**6), values)


def rows_of(kind: str, most: int, *rows: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[str, Rows]]:
    """The kind and some rows, of which no two of :func:`with_both` are alike but for their last column."""
    similar = {"mesages", "txet"}
    unlike = st.lists(
        st.one_of(*rows),
        max_size=most,
        unique_by=lambda row: str(next(iter(row.values()))) if similar & {*list(row)[1:]} else id(row),
    )
    return st.tuples(st.just(kind), unlike)


@given(
    rows_of("chat", 8, chats, lost_chats, with_both("chat", "mesages", several))
    | rows_of("classes", 12, classes, lost_classes, with_both("classes", "txet", dirty))
)
@settings(max_examples=50, deadline=None)
def test_a_second_repair_changes_nothing(tmp_path_factory: pytest.TempPathFactory, wild: tuple[str, Rows]) -> None:
    folder, (kind, rows) = tmp_path_factory.mktemp("wild"), wild
    path, once, twice = (folder / name / "rows.jsonl" for name in ("in", "once", "twice"))
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, [*(HEALTHY[kind][0](n) for n in range(40)), *rows])))
    task = TaskSettings(type=HEALTHY[kind][1])
    first = repair(DataSettings(path=str(path)), task, once)
    again = repair(DataSettings(path=str(once)), task, twice)
    assert once.read_bytes() == twice.read_bytes(), (first.lines(), again.lines())
    assert not again.mended and not again.left_out
    gone = {"mojibake", "control", "half_character", "duplicate", "empty", "null", "last_turn", "broken"}
    stays = {"role", "wrong_type", "misspelt_column"} & {finding.kind for finding in first.remains.findings}
    assert stays or not gone & {finding.kind for finding in first.remains.findings}
