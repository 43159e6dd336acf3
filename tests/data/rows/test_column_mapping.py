"""Which column plays which part: recognised names, types, data.columns, the choice of a task, and every complaint."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakeet.config import DataSettings, TaskName
from lorakeet.data.read.column_types import (
    EMPTY_LIST,
    FLOAT,
    INT,
    INT_LIST,
    STR_LIST,
    ColumnType,
    ColumnTypes,
    TypeInference,
    type_names,
)
from lorakeet.data.read.column_types import STR as A_STR
from lorakeet.data.rows.column_mapping import LABEL_NAMES, choose_task, find_layout, merge_layouts, unused_columns
from lorakeet.data.rows.kinds import Layout, all_kinds
from lorakeet.errors import DataError

Types = dict[str, str]


def layout_of(types: Types, task: TaskName = "CAUSAL_LM", **columns: str) -> Layout:
    return find_layout(parsed(types), DataSettings(columns=columns), task, "a.jsonl")


def parsed(types: Types) -> dict[str, ColumnTypes]:
    """Types of columns, of a notation such as ``int or list[str]``."""

    def one(name: str) -> ColumnType:
        return ColumnType(name[5:-1], is_list=True) if name.startswith("list") else ColumnType(name)

    return {
        column: frozenset(one(name) for name in names.split(" or ") if name != "null")
        for column, names in types.items()
    }


def complaint_of(types: Types, task: TaskName = "CAUSAL_LM", **columns: str) -> DataError:
    with pytest.raises(DataError) as caught:
        layout_of(types, task, **columns)
    return caught.value


STR, LIST = "str", "list[str]"
TURNS = "list[dict]"


@pytest.mark.parametrize(
    ("columns", "task", "kind", "roles"),
    [
        ("id:int Text:str", "CAUSAL_LM", "text", "text=Text"),
        ("text:str", "auto", "text", "text"),
        ("text:str content:str", "CAUSAL_LM", "text", "text"),
        ("n:int saying:str", "CAUSAL_LM", "text", "text=saying"),
        ("text:str label:int", "CAUSAL_LM", "text", "text"),
        ("meta:dict meta.lang:str body:str", "MASKED_LM", "text", "text=body"),
        ("meta:dict meta.lang:str saying:str", "MASKED_LM", "text", "text=saying"),
        ("prompt:str completion:str text:str", "CAUSAL_LM", "completion", "prompt completion"),
        ("prompt:str response:str", "CAUSAL_LM", "completion", "prompt completion=response"),
        ("prompt:list[dict] completion:list[dict]", "CAUSAL_LM", "messages", "prompt completion"),
        ("messages:list[dict] tools:str prompt:str completion:str", "CAUSAL_LM", "messages", "messages tools"),
        ("messages:str", "CAUSAL_LM", "messages", "messages"),
        ("conversations:list[dict] system:str", "CAUSAL_LM", "messages", "conversations system"),
        ("instruction:str input:str output:str text:str", "CAUSAL_LM", "messages", "instruction output input"),
        ("instruction:str output:str input:null", "CAUSAL_LM", "messages", "instruction output"),
        ("text:str label:int", "SEQ_CLS", "classes", "text label"),
        ("review:str Category:str", "SEQ_CLS", "classes", "text=review label=Category"),
        ("text:str label:int score:float", "SEQ_CLS", "classes", "text label"),
        ("text:str labels:list[str]", "SEQ_CLS", "classes", "text label=labels"),
        ("sentence1:str sentence2:str label:int", "SEQ_CLS", "classes", "text=sentence1 text_pair=sentence2 label"),
        ("premise:str hypothesis:str label:int", "SEQ_CLS", "classes", "text=premise text_pair=hypothesis label"),
        ("tokens:list[str] ner_tags:list[int] id:str", "TOKEN_CLS", "tags", "tokens tags=ner_tags"),
        ("words:str labels:str", "TOKEN_CLS", "tags", "tokens=words tags=labels"),
        ("anchor:str positive:str negative:str", "FEATURE_EXTRACTION", "pairs", "anchor positive negative"),
        ("query:str positive:str", "FEATURE_EXTRACTION", "pairs", "anchor=query positive"),
        (
            "sentence1:str sentence2:str rating:float",
            "FEATURE_EXTRACTION",
            "pairs",
            "anchor=sentence1 positive=sentence2",
        ),
        ("src:str tgt:str", "SEQ_2_SEQ_LM", "translation", "source=src target=tgt"),
        ("input:str output:str", "SEQ_2_SEQ_LM", "translation", "source=input target=output"),
        ("prompt:str completion:str", "SEQ_2_SEQ_LM", "translation", "source=prompt target=completion"),
        ("instruction:str input:str output:str", "SEQ_2_SEQ_LM", "translation", "instruction output input"),
        (
            "translation:dict translation.en:str translation.de:str",
            "SEQ_2_SEQ_LM",
            "translation",
            "source=translation.en target=translation.de",
        ),
        (
            "question:str context:str answers:dict answers.text:list[str]",
            "QUESTION_ANS",
            "question",
            "question context answers",
        ),
        (
            "question:str context:str answer:str answer_start:int",
            "QUESTION_ANS",
            "question",
            "question context answers=answer answer_start",
        ),
    ],
)
def test_recognised(columns: str, task: TaskName, kind: str, roles: str) -> None:
    """``columns``: name:type …; ``roles``: role=column, or the role alone where the column is called so."""
    types = dict(column.split(":") for column in columns.split())
    wanted = {role: column or role for role, _, column in (part.partition("=") for part in roles.split())}
    layout = layout_of(types, task)
    assert (layout.kind, dict(layout.columns)) == (kind, wanted)
    held = {role: types[column] for role, column in wanted.items() if role in ("label", "tags")}
    names = {name: str(type) for name, type in layout.types.items()}
    assert names == ({"tags": "list[str]"} if held == {"tags": "str"} else held)


def test_every_name_of_every_role_is_recognised_in_any_case() -> None:
    for kind in all_kinds():
        for roles in kind.roles:
            usual = {role: known.names[0] for role, known in roles.required.items()}
            for role, known in roles.required.items():
                for name in known.names:
                    columns = {**usual, role: name.upper()}
                    lists = ("messages", "conversations", "tokens", "tags")
                    if kind.name == "messages":
                        lists = (*lists, "completion")
                    types = {column: LIST if part in lists else STR for part, column in columns.items()}
                    for task in kind.encoders:
                        layout = layout_of(types, task)
                        assert layout.kind == kind.name and layout.columns[role] == name.upper(), (task, role, name)


def test_columns_say_what_names_do_not() -> None:
    types = {"a": STR, "b": STR, "c": "int", "d": STR}
    assert layout_of(types, text="b").columns == {"text": "b"}
    assert layout_of(types, prompt="b", completion="a").columns == {"prompt": "b", "completion": "a"}
    assert layout_of(types, "SEQ_CLS", text="a", label="c").columns == {"text": "a", "label": "c"}
    layout = layout_of({"meta": "dict", "meta.body": STR, "text": STR}, text="meta.body")
    assert layout.columns == {"text": "meta.body"}
    assert layout_of({"text": STR, "topic": STR}, "SEQ_CLS", label="topic").columns == {
        "text": "text",
        "label": "topic",
    }
    translation = {"translation": "dict", "translation.en": STR, "translation.de": STR, "translation.fr": STR}
    layout = layout_of(translation, "SEQ_2_SEQ_LM", source="translation.fr", target="translation.de")
    assert layout.columns == {"source": "translation.fr", "target": "translation.de"}
    layout = layout_of(
        dict(list(translation.items())[:3]), "SEQ_2_SEQ_LM", source="translation.de", target="translation.en"
    )
    assert layout.columns == {"source": "translation.de", "target": "translation.en"}


def test_unknown_columns_and_roles_come_with_the_nearest_name() -> None:
    types = {"quote": STR, "comment": STR}
    error = complaint_of(types, text="coment")
    assert "a.jsonl has no column 'coment'; it has 'quote' (str), 'comment' (str)" in error.message
    assert error.hint == "did you mean 'comment'?"
    error = complaint_of(types, txt="comment")
    assert "data.columns.txt: no such part of a row" in error.message and error.hint and "'text'" in error.hint
    error = complaint_of(types, label="comment")
    assert "data.columns.label: CAUSAL_LM has no use for it" in error.message
    assert error.hint and "task.type=SEQ_CLS" in error.hint
    error = complaint_of(types, tezt="comment", label="nowhere")  # all at once
    assert all(word in error.message for word in ("columns.tezt", "columns.label", "'nowhere'"))
    error = complaint_of(types, text="quote", prompt="comment")
    assert "no kind of rows for CAUSAL_LM has 'text' and 'prompt' together" in error.message


def test_nothing_recognised_says_what_was_sought_and_what_is_near() -> None:
    error = complaint_of({"review": STR, "lable": "int"}, "SEQ_CLS")
    assert (
        "a.jsonl has no columns for SEQ_CLS: expected text + label; it has 'review' (str), 'lable' (int)"
        in error.message
    )
    assert error.hint and "data.columns.label=lable" in error.hint
    error = complaint_of({"n": "int"})
    assert "expected" in error.message and error.hint and "--text-column" in error.hint
    error = complaint_of({}, "MASKED_LM")
    assert "it has none" in error.message
    error = complaint_of({"messages": "int", "id": "int"})
    assert "'messages' (int)" in error.message


def test_more_than_one_column_may_be_meant() -> None:
    error = complaint_of({"saying": STR, "comment": STR})
    assert "more than one column of text: 'saying', 'comment'" in error.message
    assert error.hint and "--text-column saying" in error.hint and "data.columns.text=saying" in error.hint
    error = complaint_of({"quote": STR, "body": STR, "n": "int"})
    assert "'quote', 'body'" in error.message
    error = complaint_of({"tokens": LIST, "ner_tags": "list[int]", "pos_tags": "list[int]"}, "TOKEN_CLS")
    assert error.hint and "data.columns.tags=ner_tags" in error.hint
    error = complaint_of({"text": STR, "Text": STR})
    assert "'text', 'Text'" in error.message


def test_labels_are_of_one_type() -> None:
    assert layout_of({"text": STR, "label": "float or int"}, "SEQ_CLS").types["label"] == FLOAT
    assert layout_of({"text": STR, "label": "bool"}, "SEQ_CLS").types["label"] == INT
    assert layout_of({"text": STR, "label": "list[bool]"}, "SEQ_CLS").types["label"] == INT_LIST
    assert "holds int or str" in complaint_of({"text": STR, "label": "int or str"}, "SEQ_CLS").message


@pytest.mark.parametrize(
    ("types", "task"),
    [
        ({"text": STR}, "MASKED_LM"),
        ({"text": STR, "label": "int"}, "SEQ_CLS"),
        ({"a": STR, "b": STR, "label": "int"}, "SEQ_CLS"),  # which text, find_layout asks
        ({"sentence1": STR, "sentence2": STR, "label": "int"}, "SEQ_CLS"),
        ({"sentence1": STR, "sentence2": STR}, "FEATURE_EXTRACTION"),
        ({"query": STR, "positive": STR}, "FEATURE_EXTRACTION"),
        ({"tokens": LIST, "labels": LIST}, "TOKEN_CLS"),
        ({"question": STR, "context": STR, "answers": "dict"}, "QUESTION_ANS"),
        ({"question": STR, "context": STR, "answer": STR}, "QUESTION_ANS"),
        ({"question": STR, "answer": STR}, "FEATURE_EXTRACTION"),
        ({}, "MASKED_LM"),
    ],
)
def test_the_task_of_an_encoder_follows_from_the_columns(types: Types, task: str) -> None:
    assert choose_task("encoder", parsed(types)) == task
    assert choose_task("decoder", parsed(types)) == "CAUSAL_LM"
    assert choose_task("encoder-decoder", parsed(types)) == "SEQ_2_SEQ_LM"


def test_the_task_follows_from_named_columns_too() -> None:
    types = {"body": STR, "topic": STR}
    assert choose_task("encoder", parsed(types)) == "MASKED_LM"
    assert choose_task("encoder", parsed(types), {"label": "topic"}) == "SEQ_CLS"
    assert choose_task("encoder", parsed(types), {"anchor": "body", "positive": "topic"}) == "FEATURE_EXTRACTION"


def test_layouts_of_several_sources_become_one() -> None:
    first = Layout("classes", {"text": "text", "label": "label"}, {"label": INT})
    other = Layout("classes", {"text": "body", "label": "y", "text_pair": "b"}, {"label": FLOAT})
    merged = merge_layouts({"a": first, "b": other})
    assert merged.columns == {"text": "text", "label": "label", "text_pair": "b"} and merged.types["label"] == FLOAT
    lists = [Layout("classes", {}, {"label": held}) for held in (EMPTY_LIST, STR_LIST)]
    assert merge_layouts({"a": lists[0], "b": lists[1]}).types["label"] == STR_LIST
    with pytest.raises(DataError, match=r"b has label of type str, others have int"):
        merge_layouts({"a": first, "b": Layout("classes", {}, {"label": A_STR})})
    with pytest.raises(DataError, match=r"more than one kind: text \(b\), classes \(a\)|classes \(a\), text \(b\)"):
        merge_layouts({"a": first, "b": Layout("text", {})})


def test_columns_of_labels_that_are_left_unused() -> None:
    types = {"text": STR, "Label": "int", "n": "int"}
    assert unused_columns(parsed(types), layout_of(types), LABEL_NAMES) == ["Label"]
    assert unused_columns(parsed(types), layout_of(types, "SEQ_CLS"), LABEL_NAMES) == []


def test_types_of_values() -> None:
    names = TypeInference()
    for row in (
        {"a": 1, "b": "x", "c": [], "d": None, "e": {"t": ["x"], "n": 1}},
        {"a": None, "b": 2.5, "c": [[1]], "e": None, "f": True},
        {"c": None, "e": {"n": None}},
    ):
        names.add(row)
    found = {name: type_names(types) for name, types in names.types().items()}
    assert found == {
        "a": "int", "b": "float or str", "c": "list[list[int]]", "d": "null", "e": "dict",
        "e.t": "list[str]", "e.n": "int", "f": "bool",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (["1", " -2 ", ""], "int"),
        (["1", "2.5"], "float"),
        (["1e-3", ".5", "2."], "float"),
        (["1", "x"], "str"),
        (["1_000"], "str"),
        (["nan"], "null"),
        (["1", "NaN"], "int"),
        (["١"], "str"),
        (["9" * 30], "float"),
        ([""], "null"),
    ],
)
def test_numbers_of_a_csv_file(fields: list[str], kind: str) -> None:
    names = TypeInference(numbers=True)
    for field in fields:
        names.add({"x": field})
    assert type_names(names.types()["x"]) == kind


@given(st.dictionaries(st.text(max_size=8), st.sampled_from([STR, "int", LIST, TURNS, "dict", "null", "int or str"])))
def test_any_columns_are_understood_or_complained_about(types: Types) -> None:
    for task in {task for kind in all_kinds() for task in kind.encoders}:
        try:
            layout = layout_of(types, task)
        except DataError as error:
            assert "a.jsonl" in error.message and error.hint
        else:
            assert set(layout.columns.values()) <= types.keys()
            assert len(set(layout.columns.values())) == len(layout.columns)
