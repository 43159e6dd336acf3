"""Labels: found or given, and every way in which they can be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.task_tokenizers import locations
from lorakeet.config import TaskName, TaskSettings
from lorakeet.data.read.column_types import FLOAT, STR, STR_LIST, ColumnType
from lorakeet.data.rows.label_set import LabelSet, find_labels, given_labels
from lorakeet.errors import DataError


def found(*labels: Any, **task: Any) -> LabelSet:
    return find_labels(labels, locations(len(labels)), TaskSettings(type="SEQ_CLS", **task), "a.jsonl")


@pytest.mark.parametrize(
    ("labels", "names", "problem"),
    [
        (["spam", "ham", "spam"], ("ham", "spam"), "single_label"),
        ([3, 1, 20, 1], ("1", "3", "20"), "single_label"),
        (["10", "9"], ("9", "10"), "single_label"),
        (["10", "9", "x"], ("10", "9", "x"), "single_label"),
        ([1.0, 0.0, 1.0], ("0", "1"), "single_label"),
        ([1.0, 0.5], (), "regression"),
        ([["b", "a"], [], ["c"]], ("a", "b", "c"), "multi_label"),
        ([[0], [2, 1]], ("0", "1", "2"), "multi_label"),
        ([-1, 1], ("-1", "1"), "single_label"),
    ],
)
def test_what_labels_are(labels: list[Any], names: tuple[str, ...], problem: str) -> None:
    assert found(*labels) == LabelSet(names, problem)  # type: ignore[arg-type]


def test_numbers_of_names() -> None:
    labels = found("ham", "spam", labels=["spam", "ham"])
    assert labels.names == ("spam", "ham") and [labels.target(one) for one in ("spam", "ham")] == [0, 1]
    assert [found(0, 1, 1, labels=["no", "yes"]).target(label) for label in (0, 1)] == [0, 1]
    stars = found(1, 5, labels=["1", "2", "3", "4", "5"])  # names that are numbers are meant as names
    assert [stars.target(label) for label in (1, 5, 5.0)] == [0, 4, 4]
    assert found([1], [0]).target([1]) == [0.0, 1.0]
    assert found(1, 2, problem="regression").target(2) == 2.0
    assert found("a", "b", problem="multi_label").target("b") == [0.0, 1.0]


def test_how_often_a_label_stands_in_rows() -> None:
    assert LabelSet(("a", "b", "c")).count([["a", "a"], ["b"], [0]]) == {"a": 3, "b": 1, "c": 0}
    assert LabelSet(("a", "b"), "single_label").count(["b", 1, "b"]) == {"a": 0, "b": 3}
    assert LabelSet((), "regression").count([0.5]) == {}


@pytest.mark.parametrize(
    ("labels", "task", "words", "hint"),
    [
        (
            ["ham", "sapm", "x"],
            {"labels": ["ham", "spam"]},
            ["a.jsonl:2: label 'sapm'", "did you mean 'spam'", "a.jsonl:3"],
            None,
        ),
        (["ham"] + ["x"] * 9, {"labels": ["ham", "spam"]}, ["a.jsonl:2", "a.jsonl:4", "and 6 more"], "task.labels"),
        ([0, 2], {"labels": ["no", "yes"]}, ["label 2, expected a name or a number below 2"], None),
        ([0, 4], {"labels": ["1", "4"]}, ["a.jsonl:1: label '0' is none of the 2"], None),
        (["a", "a"], {}, ["only the label 'a'", "nothing to tell apart"], "two classes"),
        (["a", "b"], {"problem": "regression"}, ["task.problem=regression", "are words"], "leave task.problem out"),
        ([["a"], ["b"]], {"problem": "single_label"}, ["are lists of labels"], None),
        ([0.5, 1.0], {"problem": "single_label"}, ["has the label 0.5"], "task.problem=regression"),
        ([0.5, 1.5], {"labels": ["a", "b"]}, ["is a regression"], None),
        ([float("inf"), 0.5], {}, ["a.jsonl:1: label inf, expected a finite number"], None),
        (["a", "b"], {"labels": ["a", "b", "a"]}, ["task.labels has 'a' more than once"], None),
        ([f"text {n}" for n in range(1200)], {}, ["1,200 different labels", "'text 0'"], "data.columns.label"),
    ],
)
def test_labels_that_cannot_be_learned(
    labels: list[Any], task: dict[str, Any], words: list[str], hint: str | None
) -> None:
    with pytest.raises(DataError) as caught:
        found(*labels, **task)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert hint is None or hint in str(caught.value.hint)


def test_tags() -> None:
    tags = [["N", "V"], ["N"]]
    assert find_labels(tags, locations(2), TaskSettings(type="TOKEN_CLS"), "x") == LabelSet(("N", "V"))
    with pytest.raises(DataError, match="a.jsonl:1: label 'V' is none of the 2"):
        find_labels(tags, locations(2), TaskSettings(type="TOKEN_CLS", labels=["N", "X"]), "x")


def test_labels_of_a_stream_are_given() -> None:
    def given(task: TaskName, type: ColumnType, **settings: Any) -> LabelSet:
        return given_labels(type, TaskSettings(type=task, **settings))

    assert given("SEQ_CLS", STR, labels=["a", "b"]) == LabelSet(("a", "b"), "single_label")
    assert given("SEQ_CLS", STR_LIST, labels=["a"]).problem == "multi_label"
    assert given("SEQ_CLS", FLOAT) == LabelSet((), "regression")
    assert given("SEQ_CLS", FLOAT, labels=["0", "1"]).problem == "single_label"
    assert given("TOKEN_CLS", STR_LIST, labels=["a", "b"]) == LabelSet(("a", "b"))
    cases: list[tuple[TaskName, ColumnType]] = [("SEQ_CLS", STR), ("TOKEN_CLS", STR_LIST)]
    for task, type in cases:
        with pytest.raises(DataError, match="labels of a stream") as caught:
            given(task, type)
        assert "task.labels=" in str(caught.value.hint)
