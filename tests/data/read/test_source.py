"""Records become rows of their kind: every form that people bring, values of the wrong type, rows with nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.config import DataSettings, TaskName
from lorakeet.data.read.column_types import TypeInference
from lorakeet.data.read.record import Fault, Location, Record
from lorakeet.data.read.source import iter_rows
from lorakeet.data.rows.column_mapping import find_layout
from lorakeet.data.rows.kinds import Layout, RowError, canonical
from lorakeet.errors import DataError

Put = Callable[..., Path]


def layout_of(values: dict[str, Any], task: TaskName, numbers: bool = False, **columns: str) -> Layout:
    names = TypeInference(numbers)
    names.add(values)
    return find_layout(names.types(), DataSettings(columns=columns), task, "a")


def made(values: dict[str, Any], task: TaskName = "CAUSAL_LM", **more: Any) -> dict[str, Any]:
    """The canonical row of ``values``, as a data set would hold it."""
    layout = layout_of(values, task, **more)
    row = canonical(Record(Location("a.jsonl", 7), values), layout)
    datasets.Dataset.from_list([row], features=layout.features())
    return row


def messages_of(values: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return json.loads(made(values, **more)["messages"])


def fault_of(values: dict[str, Any], like: dict[str, Any], task: TaskName = "CAUSAL_LM") -> str:
    """The complaint about ``values`` in a file whose other rows are ``like``."""
    with pytest.raises(RowError, match=r"^a\.jsonl, line 7: ") as caught:
        canonical(Record(Location("a.jsonl", 7), values), layout_of(like, task))
    return caught.value.fault.message


USER, MODEL = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho ☃."}


def test_text_and_completion() -> None:
    assert made({"quote": " x\n"}) == {"text": " x\n"}
    assert made({"prompt": "a", "completion": ""}) == {"prompt": "a", "completion": ""}
    assert made({"meta": {"body": "x"}}, text="meta.body") == {"text": "x"}
    assert made({"meta.body": "y", "meta": {"body": "x"}}, text="meta.body") == {"text": "y"}  # a name with a dot in it


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [USER, MODEL]},
        {"messages": json.dumps([USER, MODEL])},
        {"messages": [{**USER, "tool_calls": None}, {**MODEL, "name": None}]},  # as a table gives them
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i."}]}, MODEL]},
        {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho ☃."}]},
        {"conversations": [{"from": "User", "value": "Hi."}, {"from": "model", "value": "Ho ☃."}]},
        {"conversations": [USER, MODEL]},
        {"instruction": "Hi.", "input": " ", "output": "Ho ☃."},
        {"instruction": "", "input": "Hi.", "output": "Ho ☃."},
        {"instruction": "Hi.", "response": "Ho ☃."},
    ],
)  # fmt: skip
def test_conversations_in_every_form_become_one(values: dict[str, Any]) -> None:
    row = made(values)
    assert row == {"messages": json.dumps([USER, MODEL], ensure_ascii=False), "tools": None, "given": 0}


def test_alpaca_puts_the_input_below_the_instruction() -> None:
    values = {"instruction": "Turn round:", "input": "abc", "output": "cba", "system": "Be brief."}
    assert [turn["content"] for turn in messages_of(values)] == ["Be brief.", "Turn round:\n\nabc", "cba"]
    assert made(values, "SEQ_2_SEQ_LM") == {"source": "Turn round:\n\nabc", "target": "cba"}


def test_sharegpt_with_system_and_tools() -> None:
    turns = [("system", "S"), ("human", "Q"), ("function_call", "F"), ("observation", "R"), ("gpt", "A")]
    values = {"conversations": [{"from": who, "value": said} for who, said in turns], "tools": '[{"name": "f"}]'}
    assert [turn["role"] for turn in messages_of(values)] == ["system", "user", "assistant", "tool", "assistant"]
    assert made(values)["tools"] == '[{"name": "f"}]'
    values = {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "alien", "value": "?"}]}
    assert [turn["role"] for turn in messages_of(values)] == ["system", "user", "alien"]  # judged by who renders it


def test_tools_and_calls_are_kept_whole() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": None}}}]
    row = made({"messages": [USER, {**call, "content": None, "name": None}], "tools": tools})
    assert json.loads(row["messages"]) == [USER, call]
    assert json.loads(row["tools"]) == tools
    assert json.loads(made({"messages": [USER], "tools": json.dumps([json.dumps(tools[0])])})["tools"]) == tools
    assert made({"messages": [USER], "tools": ""})["tools"] is None
    assert made({"messages": [USER], "tools": []})["tools"] is None


def test_prompt_and_completion_of_messages() -> None:
    row = made({"prompt": [USER, MODEL, USER], "completion": [MODEL]})
    assert json.loads(row["messages"]) == [USER, MODEL, USER, MODEL] and row["given"] == 3
    row = made({"prompt": [USER], "completion": "Ho ☃."})
    assert json.loads(row["messages"]) == [USER, MODEL] and row["given"] == 1
    row = made({"prompt": "Hi.", "completion": [MODEL], "tools": [{"name": "f"}]})
    assert json.loads(row["messages"]) == [USER, MODEL] and row["given"] == 1 and row["tools"] == '[{"name": "f"}]'


@pytest.mark.parametrize(
    ("label", "kind", "expected"),
    [
        ("good", "string", "good"),
        (3, "int64", 3),
        (True, "int64", 1),
        (0.5, "float64", 0.5),
        (["a", "b"], datasets.List(datasets.Value("string")), ["a", "b"]),
        ([], datasets.List(datasets.Value("string")), []),
        (float("nan"), "float64", None),
        ([1, 0], datasets.List(datasets.Value("int64")), [1, 0]),
    ],
)
def test_labels(label: Any, kind: Any, expected: Any) -> None:
    values = {"text": "x", "label": label}
    assert made(values, "SEQ_CLS") == {"text": "x", "label": expected}
    feature = layout_of(values, "SEQ_CLS").features()["label"]
    assert feature == (datasets.Value(kind) if isinstance(kind, str) else kind)


@pytest.mark.parametrize(("field", "expected"), [("3", 3), ("0.5", 0.5), ("a", "a"), ("-1", -1)])
def test_labels_of_a_csv_file_are_numbers_where_they_read_as_such(field: str, expected: Any) -> None:
    assert made({"text": "x", "label": field}, "SEQ_CLS", numbers=True)["label"] == expected


def test_pairs_of_texts() -> None:
    assert made({"premise": "a", "hypothesis": "b", "label": 1}, "SEQ_CLS") == {
        "text": "a",
        "text_pair": "b",
        "label": 1,
    }
    assert made({"query": "a", "positive": "b"}, "FEATURE_EXTRACTION") == {"anchor": "a", "positive": "b"}
    values = {"anchor": "a", "positive": "b", "negative": "c"}
    assert made(values, "FEATURE_EXTRACTION") == values
    assert made({"translation": {"en": "a", "de": "b"}}, "SEQ_2_SEQ_LM") == {"source": "a", "target": "b"}


def test_tags() -> None:
    assert made({"tokens": ["A", "b"], "tags": [1, 0]}, "TOKEN_CLS") == {"tokens": ["A", "b"], "tags": [1, 0]}
    assert made({"words": ["A"], "upos": ["DET"]}, "TOKEN_CLS") == {"tokens": ["A"], "tags": ["DET"]}
    assert made({"words": "A  b", "upos": "DET X"}, "TOKEN_CLS") == {"tokens": ["A", "b"], "tags": ["DET", "X"]}


SQUAD = {"question": "Who?", "context": "It was me.", "answers": {"text": ["me"], "answer_start": [7]}}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"text": ["me"], "answer_start": [7]}, (["me"], [7])),
        ({"text": ["me", "It"], "answer_start": [7, 0]}, (["me", "It"], [7, 0])),
        ({"text": "me", "answer_start": 7}, (["me"], [7])),
        ([{"text": "me", "answer_start": 7}], (["me"], [7])),
        ({"text": [], "answer_start": []}, ([], [])),
        (["me"], (["me"], [7])),
        ([], ([], [])),
        ("me", (["me"], [7])),
        ("", ([], [])),
    ],
)
def test_answers(answers: Any, expected: tuple[list[str], list[int]]) -> None:
    row = made({**SQUAD, "answers": answers}, "QUESTION_ANS")
    assert (row["answers"], row["answer_start"]) == expected
    assert row["context"] == "It was me."


def test_an_answer_and_where_it_begins_in_columns_of_their_own() -> None:
    values = {"question": "Who?", "context": "me and me", "answer": "me", "answer_start": 7}
    assert made(values, "QUESTION_ANS")["answer_start"] == [7]
    del values["answer_start"]
    assert made(values, "QUESTION_ANS")["answer_start"] == [0]


TEXT, LABELLED, TAGGED = {"text": "x"}, {"text": "x", "label": 1}, {"tokens": ["a"], "tags": [1]}
LISTED, CHAT, BRIEF = {"text": "x", "label": ["a"]}, {"messages": [USER]}, {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("values", "like", "task", "words"),
    [
        ({"text": 7}, TEXT, "CAUSAL_LM", "column 'text' holds int, expected a string"),
        ({"text": ["x"]}, TEXT, "CAUSAL_LM", "holds list"),
        ({"text": "\ud83d"}, TEXT, "CAUSAL_LM", "holds half a character, \\ud83d"),
        ({"text": "x", "label": "good"}, LABELLED, "SEQ_CLS", "column 'label' holds 'good', expected a whole number"),
        ({"text": "x", "label": 1.5}, LABELLED, "SEQ_CLS", "holds 1.5"),
        ({"text": "x", "label": "1_0"}, LABELLED, "SEQ_CLS", "holds '1_0'"),
        ({"text": "x", "label": 2**70}, LABELLED, "SEQ_CLS", "holds 1180591620717411303424"),
        ({"text": "x", "label": 10**400}, {"text": "x", "label": 0.5}, "SEQ_CLS", "expected a number"),
        ({"text": "x", "label": {}}, LABELLED, "SEQ_CLS", "holds {}"),
        ({"text": "x", "label": float("inf")}, LABELLED, "SEQ_CLS", "holds inf"),
        ({"text": "x", "label": 1}, {"text": "x", "label": "a"}, "SEQ_CLS", "expected a string as in the other rows"),
        ({"text": "x", "label": "a"}, LISTED, "SEQ_CLS", "expected a list of labels"),
        ({"text": "x", "label": ["a", 1]}, LISTED, "SEQ_CLS", "holds 1, expected a string"),
        ({"tokens": ["a", "b"], "tags": [1]}, TAGGED, "TOKEN_CLS", "2 tokens but 1 tags"),
        ({"tokens": ["a"], "tags": ["X"]}, TAGGED, "TOKEN_CLS", "column 'tags' holds 'X'"),
        ({"tokens": [None], "tags": [1]}, TAGGED, "TOKEN_CLS", "column 'tokens' holds None"),
        ({"tokens": 7, "tags": [1]}, TAGGED, "TOKEN_CLS", "expected a list"),
        ({"messages": {"role": "user"}}, CHAT, "CAUSAL_LM", "holds dict, expected a list of messages"),
        ({"messages": "Hi."}, CHAT, "CAUSAL_LM", "not JSON"),
        ({"messages": ["Hi."]}, CHAT, "CAUSAL_LM", "holds str as message 1"),
        ({"messages": [USER, {"content": "x"}]}, CHAT, "CAUSAL_LM", "no role in message 2"),
        ({"messages": [{"role": "user", "content": 7}]}, CHAT, "CAUSAL_LM", "int as content of message 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            CHAT,
            "CAUSAL_LM",
            "a part of type 'image' in message 1",
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, CHAT, "CAUSAL_LM", "half a character"),
        ({"messages": [USER], "tools": "no JSON"}, {**CHAT, "tools": "[]"}, "CAUSAL_LM", "column 'tools'"),
        ({"messages": [USER], "tools": "{}"}, {**CHAT, "tools": "[]"}, "CAUSAL_LM", "expected a list of tools"),
        ({"instruction": 7, "output": "x"}, BRIEF, "CAUSAL_LM", "column 'instruction' holds int"),
        ({**SQUAD, "answers": "you"}, SQUAD, "QUESTION_ANS", "holds 'you', which is not in its context"),
        (
            {**SQUAD, "answers": {"text": ["me"], "answer_start": []}},
            SQUAD,
            "QUESTION_ANS",
            "one answer_start for each",
        ),
        ({**SQUAD, "answers": {"text": [7], "answer_start": [7]}}, SQUAD, "QUESTION_ANS", "holds 7, expected a string"),
        ({**SQUAD, "answers": {"text": ["me"], "answer_start": ["x"]}}, SQUAD, "QUESTION_ANS", "holds 'x'"),
        ({**SQUAD, "answers": 7}, SQUAD, "QUESTION_ANS", "column 'answers' holds int"),
        ({**SQUAD, "answers": [7]}, SQUAD, "QUESTION_ANS", "holds 7"),
    ],
)
def test_values_that_are_not_what_their_role_needs(
    values: dict[str, Any], like: dict[str, Any], task: TaskName, words: str
) -> None:
    assert words in fault_of(values, like, task)


@pytest.mark.parametrize(
    ("values", "like", "task", "code"),
    [
        ({**SQUAD, "answers": 7}, SQUAD, "QUESTION_ANS", "wrong_type"),
        ({**SQUAD, "answers": {"text": [7], "answer_start": [7]}}, SQUAD, "QUESTION_ANS", "wrong_type"),
        ({**SQUAD, "answers": "you"}, SQUAD, "QUESTION_ANS", "answer_place"),
        ({"prompt": "a", "answer": 7}, {"prompt": "a", "answer": "b"}, "CAUSAL_LM", "wrong_type"),
        ({"text": 7}, TEXT, "CAUSAL_LM", "wrong_type"),
        ({"text": "\ud83d"}, TEXT, "CAUSAL_LM", "half_character"),
        ({"tokens": ["a", "b"], "tags": [1]}, TAGGED, "TOKEN_CLS", "tag_count"),
        ({"messages": [USER, {"content": "expected one for each"}]}, CHAT, "CAUSAL_LM", "wrong_type"),
    ],
)
def test_the_code_of_a_fault_does_not_depend_on_words(
    values: dict[str, Any], like: dict[str, Any], task: TaskName, code: str
) -> None:
    columns = {"prompt": "prompt", "completion": "answer"} if "prompt" in like else {}
    with pytest.raises(RowError) as caught:
        canonical(Record(Location("a.jsonl", 7), values), layout_of(like, task, **columns))
    assert caught.value.fault.code == code


EVERY_KIND: list[tuple[dict[str, Any], TaskName]] = [
    (TEXT, "CAUSAL_LM"),
    ({"prompt": "a", "completion": "b"}, "CAUSAL_LM"),
    (CHAT, "CAUSAL_LM"),
    ({"prompt": [USER], "completion": [MODEL]}, "CAUSAL_LM"),
    ({"conversations": [USER]}, "CAUSAL_LM"),
    (BRIEF, "CAUSAL_LM"),
    (BRIEF, "SEQ_2_SEQ_LM"),
    ({"text": "x", "text2": "y", "label": 1}, "SEQ_CLS"),
    (LISTED, "SEQ_CLS"),
    (TAGGED, "TOKEN_CLS"),
    ({"anchor": "a", "positive": "b", "negative": "c"}, "FEATURE_EXTRACTION"),
    ({"translation": {"en": "a", "de": "b"}}, "SEQ_2_SEQ_LM"),
    (SQUAD, "QUESTION_ANS"),
]


@pytest.mark.parametrize(("like", "task"), EVERY_KIND)
@pytest.mark.parametrize("empty", ["nothing", "nulls", "fault"])
def test_a_row_with_nothing_keeps_its_place_and_is_null(like: dict[str, Any], task: TaskName, empty: str) -> None:
    values = {"nothing": {}, "nulls": dict.fromkeys(like), "fault": None}[empty]
    layout = layout_of(like, task)
    fault = Fault("broken", "broken") if values is None else None
    row = canonical(Record(Location("a.csv", 3), values, fault), layout)
    assert set(row) == set(layout.features())
    assert row.pop("given", None) in (0, None)
    assert not any(row.values())
    assert row.get("answers") is None and row.get("tokens") is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "answer_start"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(EVERY_KIND), st.data())
def test_any_record_is_a_row_or_a_complaint(kind: tuple[dict[str, Any], TaskName], data: st.DataObject) -> None:
    like, task = kind
    layout = layout_of(like, task)
    values = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys([*like, "answer_start"], json_values)))
    try:
        row = canonical(Record(Location("a", 1, "row"), {**like, **values}), layout)
    except RowError:
        return
    assert set(row) == set(layout.features())
    datasets.Dataset.from_list([row], features=layout.features())  # every value is of its column's type


def test_rows_of_everything_that_a_path_names(put: Put) -> None:
    folder = put("all/a.jsonl", '{"text": "a"}\nbroken\n{"text": "b"}').parent
    put("all/b.csv", 'text\n"c\nd"\ne,f')
    put("all/c.txt", "")
    found = [
        (Path(row.location.source).name, row.location.number, row.values is None)
        for row in iter_rows(DataSettings(path=str(folder)))
    ]
    assert found == [
        ("a.jsonl", 1, False), ("a.jsonl", 2, True), ("a.jsonl", 3, False),
        ("b.csv", 2, False), ("b.csv", 4, True), ("c.txt", 0, True),
    ]  # fmt: skip
    assert len(list(iter_rows(DataSettings(path=str(folder), limit=2)))) == 2
    with pytest.raises(DataError, match="no file or folder"):
        list(iter_rows(DataSettings(path=[str(folder), "nowhere"])))
