"""Baselines computed by hand and compared with those of scikit-learn."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import f1_score

from lorakeet.tasks import baselines
from lorakeet.tasks.baselines import baseline, baselines_for, frequent_tag, majority, tfidf
from lorakeet.tasks.task import Task

TRAIN = {
    "text": ["a red bird", "the bird sings", "birds!", "hot soup", "soup of the day", "bread", "a bird again"],
    "label": ["bird", "bird", "bird", "food", "food", "food", "bird"],
}
HELD_OUT = {"text": ["one bird", "cold soup", "soup"], "label": ["bird", "food", "food"]}
SOURCES = Task("SEQ_CLS", "single_label", ("bird", "food", "tool"))


def test_the_majority_class_as_scikit_learns_dummy() -> None:
    learned, labels = np.array([0, 0, 0, 1, 1, 1, 0]), np.array([0, 1, 1])
    guess = DummyClassifier(strategy="most_frequent").fit(learned[:, None], learned).predict(labels[:, None])
    expected = {"accuracy": 1 / 3, "macro_f1": f1_score(labels, guess, average="macro")}
    assert majority("single_label", learned, labels) == pytest.approx(expected)
    assert baselines_for(SOURCES, TRAIN, HELD_OUT)["majority"] == pytest.approx(expected)


def test_the_most_frequent_set_of_labels() -> None:
    train = {"text": list("abcd"), "label": [["x"], ["x", "z"], ["z", "x"], []]}
    held_out = {"text": list("ef"), "label": [["x"], ["z", 0]]}
    found = baselines_for(Task("SEQ_CLS", "multi_label", ("x", "y", "z")), train, held_out)["majority"]
    # {x, z} for both texts: two right of x, one of two right of z
    assert found == pytest.approx({"micro_f1": 6 / 7, "macro_f1": (1 + 0 + 2 / 3) / 3, "exact_match": 1 / 2})


def test_the_mean_as_scikit_learns_dummy() -> None:
    learned, labels = np.array([1.0, 2, 6]), np.array([2.0, 5])
    guess = DummyRegressor().fit(learned[:, None], learned).predict(labels[:, None])
    assert majority("regression", learned, labels) == {"mse": ((guess - labels) ** 2).mean(), "mae": 1.5}


def test_tfidf_of_classes() -> None:
    found = baselines_for(SOURCES, TRAIN, HELD_OUT)
    assert found["tfidf"] == {"accuracy": 1, "macro_f1": 1} and found["majority"]["accuracy"] < 0.4
    swapped = [
        datasets.Dataset.from_dict(
            {"text": ["so"] * len(rows["text"]), "text_pair": rows["text"], "label": rows["label"]}
        )
        for rows in (TRAIN, HELD_OUT)
    ]
    assert baselines_for(SOURCES, *swapped)["tfidf"]["accuracy"] == 1


@pytest.mark.filterwarnings("error")
def test_tfidf_of_label_sets_and_numbers() -> None:
    texts = ["red", "blue", "red blue", "green", "red green"] * 4
    sets = np.array([[("red" in text), ("blue" in text), False, True] for text in texts]).astype(int)
    found = tfidf("multi_label", texts, sets, ["blue red", "green"], np.array([[1, 1, 0, 1], [0, 0, 0, 1]]))
    assert found["exact_match"] == 1 and found["micro_f1"] == 1
    length = np.array([float(text.count(" ")) for text in texts])
    assert tfidf("regression", texts, length, ["red blue", "red"], np.array([1.0, 0]))["mae"] < 0.3


def test_tfidf_of_a_single_class_is_the_majority() -> None:
    found = tfidf("single_label", ["a", "b"], np.array([1, 1]), ["a", "c"], np.array([1, 0]))
    assert found == majority("single_label", np.array([1, 1]), np.array([1, 0]))


def test_tfidf_uses_a_limited_number_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, labels = ["bird", "owl", "soup", "rice", "saw"], np.array([0, 1, 1, 0, 2])
    held_out = ["owl", "rice", "saw"], np.array([1, 0, 2])
    assert tfidf("single_label", texts, labels, *held_out)["accuracy"] == 1
    monkeypatch.setattr(
        baselines, "MAX_TEXTS", 3
    )  # the first, the middle and the last text: owl and rice are never seen
    assert tfidf("single_label", texts, labels, *held_out)["accuracy"] < 1


# ---- tags -------------------------------------------------------------------------------------------------------

SENTENCES = [["the", "run"], ["they", "run"], ["run", "the", "."], ["the", "Run", "."], ["un", "known"]]
TAGS = [[0, 1], [2, 3], [3, 0, 4], [0, 1, 4], [0, 0]]


def test_the_most_frequent_tag_of_each_word() -> None:
    found = frequent_tag(SENTENCES, TAGS, [["the", "run", "now"], ["Run", "."]], [[0, 1, 0], [1, 0]])
    # run: 1, 3, 3 -> 3, wrong; now: never seen -> 0, the most frequent of all, right; "Run" is another word than "run"
    assert found["accuracy"] == 3 / 5
    spans = frequent_tag([["a", "b"]], [[0, 1]], [["b", "a"]], [[1, 0]], ["O", "B-x"])
    assert spans["span_f1"] == 1
    by_name = baselines_for(Task("TOKEN_CLS", labels=tuple("vwxyz")), TAGGED, TAGGED_TOO)
    assert by_name == {"frequent_tag": found}


# ---- of a run ---------------------------------------------------------------------------------------------------

TAGGED = {"tokens": SENTENCES, "tags": [["vwxyz"[tag] for tag in tags] for tags in TAGS]}
TAGGED_TOO = {"tokens": [["the", "run", "now"], ["Run", "."]], "tags": [["v", "w", "v"], ["w", "v"]]}


@pytest.mark.parametrize(
    ("task", "train", "held_out", "name"),
    [
        (SOURCES, TRAIN, HELD_OUT, "majority"),
        (Task("TOKEN_CLS", labels=tuple("vwxyz")), TAGGED, TAGGED_TOO, "frequent_tag"),
        (
            Task("SEQ_CLS", "regression"),
            {"text": ["a", "b"], "label": [1.0, 2]},
            {"text": ["a"], "label": [3]},
            "majority",
        ),
    ],
)
def test_the_baseline_of_a_run(task: Task, train: dict, held_out: dict, name: str) -> None:
    rows = {"train_rows": datasets.Dataset.from_dict(train), "held_out_rows": datasets.Dataset.from_dict(held_out)}
    assert baseline(task, SimpleNamespace(**rows)) == baselines_for(task, train, held_out)[name]
    for part in rows:
        assert baseline(task, SimpleNamespace(**{**rows, part: None})) == {}  # a stream, or nothing held out
    assert baseline(Task("SEQ_2_SEQ_LM"), SimpleNamespace(**rows)) == {}
