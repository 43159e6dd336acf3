"""Metrics compared with the libraries that define them, computed by hand where none does, and from a Trainer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
import transformers as tf
from scipy import stats
from transformers.data.metrics import squad_metrics

from lorakeet.errors import DataError, MissingLibraryError
from lorakeet.tasks import metrics
from lorakeet.tasks import retrieval as retrieval_module
from lorakeet.tasks.metrics import compute_metrics_for, preprocess_logits_for_metrics
from lorakeet.tasks.text_metrics import answering, has_spans, rouge, span_f1


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def conll(right: list[list[str]], guess: list[list[str]]) -> dict[str, float]:
    """Return precision, recall and F1 of spans by the rules of the CoNLL evaluation."""
    counted = []
    for sentences in (right, guess):
        found = set()
        for number, tags in enumerate(sentences):
            start, before, of = 0, "O", ""
            for place, tag in enumerate([*tags, "O"]):
                now, _, kind = tag.partition("-")
                other = kind != of
                if before != "O" and (before in "ES" or now in "BSO" or other):
                    found.add((number, start, place, of))
                if now != "O" and (now in "BS" or before in "ESO" or other):
                    start = place
                before, of = now, kind
        counted.append(found)
    both = len(counted[0] & counted[1])
    precision, recall = both / max(len(counted[1]), 1), both / max(len(counted[0]), 1)
    return {
        "span_precision": precision,
        "span_recall": recall,
        "span_f1": 2 * precision * recall / (precision + recall),
    }


def prediction(predictions: Any, labels: Any) -> tf.EvalPrediction:
    return tf.EvalPrediction(predictions=predictions, label_ids=labels)


# ---- SEQ_CLS ----------------------------------------------------------------------------------------------------


def test_single_label(rng: np.random.Generator) -> None:
    logits, labels = rng.normal(size=(57, 4)), rng.choice(4, 57, p=[0.6, 0.3, 0.1, 0])
    labels[[3, 50]] = -100
    kept = labels != -100
    right, guess = labels[kept], logits.argmax(1)[kept]
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(right, guess),
        "macro_f1": sklearn.metrics.f1_score(right, guess, average="macro"),
    }
    compute = compute_metrics_for("SEQ_CLS", "single_label")
    assert compute(prediction(logits, labels)) == pytest.approx(expected, abs=1e-12)
    assert compute(prediction((logits, "hidden states"), labels)) == pytest.approx(expected, abs=1e-12)
    assert metrics.single_label(logits.argmax(1), labels) == pytest.approx(expected, abs=1e-12)


def test_multi_label(rng: np.random.Generator) -> None:
    logits, labels = rng.normal(size=(40, 5)), (rng.random((40, 5)) < 0.3).astype(np.float32)
    guess = torch.from_numpy(logits).sigmoid().numpy() > 0.5
    expected = {
        "micro_f1": sklearn.metrics.f1_score(labels, guess, average="micro"),
        "macro_f1": sklearn.metrics.f1_score(labels, guess, average="macro"),
        "exact_match": sklearn.metrics.accuracy_score(labels, guess),
    }
    compute = compute_metrics_for("SEQ_CLS", "multi_label", list("vwxyz"))
    assert compute(prediction(logits, labels)) == pytest.approx(expected, abs=1e-12)
    unknown = labels.copy()
    unknown[:, 2] = -100  # the third label is unknown
    without = np.delete(labels, 2, 1), np.delete(guess, 2, 1)
    found = compute(prediction(logits, unknown))
    assert found["micro_f1"] == pytest.approx(sklearn.metrics.f1_score(*without, average="micro"), abs=1e-12)
    assert found["exact_match"] == pytest.approx(sklearn.metrics.accuracy_score(*without), abs=1e-12)
    unlabelled = np.vstack([unknown, np.full((9, 5), -100)])  # texts without any label
    assert compute(prediction(np.vstack([logits, np.ones((9, 5))]), unlabelled)) == pytest.approx(found)


def test_regression(rng: np.random.Generator) -> None:
    labels = rng.normal(size=33)
    values = (labels + rng.normal(size=33)).astype(np.float32)
    compute = compute_metrics_for("SEQ_CLS", "regression")
    expected = {
        "mse": sklearn.metrics.mean_squared_error(labels, values),
        "mae": sklearn.metrics.mean_absolute_error(labels, values),
        "pearson": np.corrcoef(labels, values)[0, 1],
        "spearman": np.corrcoef(stats.rankdata(labels), stats.rankdata(values))[0, 1],
    }
    assert compute(prediction(values[:, None], labels)) == pytest.approx(expected, rel=1e-6)
    assert compute(prediction(np.zeros(33), labels)).keys() == {"mse", "mae"}  # a constant has no correlation
    assert compute(prediction(np.array([-99.0]), np.array([-100.0]))) == {"mse": 1, "mae": 1}  # a number like any other


# ---- TOKEN_CLS --------------------------------------------------------------------------------------------------

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "S-PER"]


def test_tags_of_words(rng: np.random.Generator) -> None:
    labels = np.array([[-100, 1, 2, -100, 0, 3, -100], [-100, 0, 0, 1, -100, -100, -100]])
    logits = rng.normal(size=(2, 7, 4))
    best = np.where(rng.random((2, 7)) < 0.6, labels.clip(0), 0)
    np.put_along_axis(logits, best[..., None], 9.0, axis=2)
    logits[labels == -100] = [9, 0, 0, 0]
    right, guess = labels[labels != -100], logits.argmax(-1)[labels != -100]
    found = compute_metrics_for("TOKEN_CLS", labels=TAGS[:4])(prediction(logits, labels))
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(right, guess))
    assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(right, guess, average="macro"))
    as_names = [
        [[TAGS[n] for n in row[label != -100]] for row, label in zip(ids, labels, strict=True)]
        for ids in (labels, logits.argmax(-1))
    ]
    assert found["span_f1"] == pytest.approx(conll(*as_names)["span_f1"])
    ids = preprocess_logits_for_metrics("TOKEN_CLS")(torch.from_numpy(logits), None).numpy()  # type: ignore[misc]
    ids[0, -1] = -100  # as a Trainer pads shorter rows
    assert compute_metrics_for("TOKEN_CLS", labels=TAGS[:4])(prediction(ids, labels)) == found
    plain = compute_metrics_for("TOKEN_CLS", labels=["DET", "NOUN", "S-LIKE", "VERB"])(prediction(logits, labels))
    assert plain.keys() == {"accuracy", "macro_f1"}


@pytest.mark.parametrize("seed", range(6))
def test_spans_as_the_conll_evaluation_counts_them(seed: int) -> None:
    """Includes invalid tags: spans that begin with I, end without E, or change their type."""
    chance = random.Random(seed)
    right = [chance.choices(TAGS, weights=[4, 2, 2, 2, 2, 1, 1], k=chance.randrange(1, 12)) for _ in range(40)]
    guess = [[tag if chance.random() < 0.7 else chance.choice(TAGS) for tag in tags] for tags in right]
    assert span_f1(guess, right) == pytest.approx(conll(right, guess), abs=1e-12)


def test_which_tags_mark_spans() -> None:
    assert has_spans(["O", "B-PER", "I-PER"]) and has_spans(["I-A", "O"]) and has_spans(["O", "U-x", "L-x", "B-x"])
    assert not has_spans(["NN", "VB", "B-"]) and not has_spans(["O"]) and not has_spans([]) and not has_spans(["S-x"])
    assert span_f1([["O", "O"]], [["O", "O"]]) == {"span_precision": 0, "span_recall": 0, "span_f1": 0}
    bilou = [["B-x", "I-x", "L-x", "U-y"]]
    assert span_f1([["B-x", "I-x", "I-x", "B-y"]], bilou)["span_f1"] == 1


# ---- QUESTION_ANS -----------------------------------------------------------------------------------------------

ANSWERS = [
    ("the Denver Broncos", ["Denver Broncos", "The Denver Broncos!"]),
    ("in  1066", ["1066", "In 1066,"]),
    ("a an the", ["the"]),  # both are empty after normalization
    ("", []),
    ("", [""]),
    ("something", []),
    ("", ["something"]),
    ("«the» café", ["« » café"]),
    ("one two two three", ["two three three", "one"]),
    ("theory", ["ory"]),
]


def test_answers_as_squad_defines_them() -> None:
    exact, overlap = [], []
    for guess, answers in ANSWERS:
        kept = [answer for answer in answers if squad_metrics.normalize_answer(answer)] or [""]
        exact.append(max(squad_metrics.compute_exact(answer, guess) for answer in kept))
        overlap.append(max(squad_metrics.compute_f1(answer, guess) for answer in kept))
        found = answering([guess], [answers])
        assert found == pytest.approx({"exact_match": exact[-1], "f1": overlap[-1]}), (guess, answers)
    guesses, answers = [guess for guess, _ in ANSWERS], [several for _, several in ANSWERS]
    found = compute_metrics_for("QUESTION_ANS")(prediction(guesses, answers))
    assert found == pytest.approx({"exact_match": np.mean(exact), "f1": np.mean(overlap)})
    assert answering(["The end."], ["end"]) == {"exact_match": 1, "f1": 1}  # one answer as a bare text


def test_answers_as_positions() -> None:
    logits = np.full((2, 4, 9), -1.0)  # start and end of four questions
    for row, (start, end) in enumerate([(2, 4), (2, 4), (6, 3), (0, 0)]):
        logits[0, row, start] = logits[1, row, end] = 1.0
    right = np.array([2, 3, 5, 0]), np.array([4, 6, 6, 0])
    found = compute_metrics_for("QUESTION_ANS")(prediction((logits[0], logits[1]), right))
    assert found == pytest.approx({"exact_match": 2 / 4, "f1": (1 + 2 * 2 / 7 + 0 + 1) / 4})


# ---- SEQ_2_SEQ_LM and MASKED_LM ---------------------------------------------------------------------------------


def test_rouge_is_the_librarys() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["The cat sat on the mat.", "a dog, a log", "", "nothing alike"]
    right = ["the CAT is on the mat", "the dog and the log", "silence", "quite other"]
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds)
    scores = [scorer.score(target, text) for target, text in zip(right, texts, strict=True)]
    expected = {kind: np.mean([score[kind].fmeasure for score in scores]) for kind in kinds}
    assert rouge(texts, right) == pytest.approx(expected) and expected["rouge2"] > 0.1
    found = compute_metrics_for("SEQ_2_SEQ_LM")(prediction(texts, right))
    assert found == pytest.approx({"exact_match": 0, **expected})
    # words of other scripts are words too, for which the library by itself finds none
    assert rouge(["наш старый дом"], ["старый дом"])["rouge1"] == pytest.approx(0.8)


class Letters:
    """Tokenizer whose ids are letters; 0 is padding."""

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(96 + int(number)) for number in ids if number)


def test_generated_ids_become_texts() -> None:
    ids = np.array([[1, 2, 3, 0], [4, 5, -100, -100]])
    right = np.array([[1, 2, 3], [4, 5, 6]])
    found = compute_metrics_for("SEQ_2_SEQ_LM", tokenizer=Letters())(prediction(ids, right))
    assert found["exact_match"] == 0.5 and found["rouge1"] == 0.5


@pytest.mark.parametrize("task", ["MASKED_LM", "SEQ_2_SEQ_LM"])
def test_loss_and_accuracy_of_predicted_tokens(task: str) -> None:
    logits, labels = torch.randn(3, 7, 11) * 3, torch.randint(0, 11, (3, 7))
    labels[torch.rand(3, 7) < 0.5] = -100
    kept = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[kept].double(), labels[kept]).item()
    accuracy = (logits[kept].argmax(-1) == labels[kept]).double().mean().item()
    expected = {"accuracy": accuracy, "loss": loss, "perplexity": math.exp(loss)}
    compute = compute_metrics_for(task)
    assert compute(prediction(logits.numpy(), labels.numpy())) == pytest.approx(expected, rel=1e-6)
    small = preprocess_logits_for_metrics(task)((logits, "cache"), labels)  # type: ignore[misc]
    assert [part.shape for part in small] == [(3, 7), (3, 7)]
    found = compute(prediction(tuple(part.numpy() for part in small), labels.numpy()))
    assert found == pytest.approx(expected, rel=1e-5)
    assert compute(prediction(small[0].numpy(), labels.numpy())) == pytest.approx({"accuracy": accuracy})


def test_small_logits_are_kept_unchanged() -> None:
    assert preprocess_logits_for_metrics("SEQ_CLS") is None and preprocess_logits_for_metrics("QUESTION_ANS") is None


# ---- FEATURE_EXTRACTION -----------------------------------------------------------------------------------------


def test_each_anchor_finds_its_positive(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_module, "CHUNK", 7)
    anchors, positives = rng.normal(size=(2, 30, 5))
    positives += 2 * anchors * rng.random((30, 1))
    similar = sklearn.metrics.pairwise.cosine_similarity(anchors, positives)
    ranks = [1 + int((row > row[i]).sum()) for i, row in enumerate(similar)]
    expected = {"accuracy_at_1": np.mean(np.array(ranks) == 1), "mrr": np.mean(1 / np.array(ranks))}
    assert 0.1 < expected["accuracy_at_1"] < 0.9
    compute = compute_metrics_for("FEATURE_EXTRACTION")
    assert compute(prediction(anchors, positives)) == pytest.approx(expected)
    assert compute(prediction((3 * anchors, positives), None)) == pytest.approx(expected)


def test_equal_vectors_find_nothing() -> None:
    same = np.ones((4, 3), np.float32)
    assert retrieval_module.retrieval(same, same) == pytest.approx(
        {"accuracy_at_1": 1 / 4, "mrr": (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4}
    )
    two = np.array([[1.0, 0], [1, 0], [0, 1]])  # the first two positives are the same text
    assert retrieval_module.retrieval(two, two) == pytest.approx({"accuracy_at_1": 2 / 3, "mrr": (0.75 + 0.75 + 1) / 3})


# ---- what is missing --------------------------------------------------------------------------------------------

EMPTY = {
    "SEQ_CLS": (np.zeros((2, 3)), np.full(2, -100)),
    "TOKEN_CLS": (np.zeros((2, 3, 4)), np.full((2, 3), -100)),
    "MASKED_LM": (np.zeros((2, 3, 4)), np.full((2, 3), -100)),
    "QUESTION_ANS": ((np.zeros((0, 4)), np.zeros((0, 4))), (np.zeros(0), np.zeros(0))),
    "FEATURE_EXTRACTION": (np.zeros((0, 4)), np.zeros((0, 4))),
}


@pytest.mark.parametrize("task", EMPTY)
def test_rows_without_labels_are_an_error(task: str) -> None:
    with pytest.raises(DataError, match="nothing to measure"):
        compute_metrics_for(task)(prediction(*EMPTY[task]))


@pytest.mark.parametrize(
    ("package", "call", "figures"),
    [("rouge_score", rouge, {"exact_match"}), ("nervaluate", span_f1, {"accuracy", "macro_f1"})],
)
def test_a_library_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    package: str,
    call: Callable[..., Any],
    figures: set,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    metrics._warn_skipped.cache_clear()
    name = package.replace("_", "-")
    with pytest.raises(MissingLibraryError, match=f"{name} is not installed") as caught:
        call(["x"], ["x"])
    assert caught.value.hint == "pip install 'lorakeet[metrics]'"
    task = "SEQ_2_SEQ_LM" if package == "rouge_score" else "TOKEN_CLS"
    given = prediction(["x"], ["x"]) if task == "SEQ_2_SEQ_LM" else prediction(np.array([[0]]), np.array([[1]]))
    for _ in range(2):
        assert compute_metrics_for(task, labels=TAGS)(given).keys() == figures
    assert [record.getMessage().split(" is")[0] for record in caplog.records] == [call.__name__]  # warned once


# ---- through transformers' own Trainer --------------------------------------------------------------------------

TINY = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_figures_of_a_trainer_are_those_of_all_its_logits(
    rng: np.random.Generator, make_args: Callable[..., tf.TrainingArguments]
) -> None:
    """Ragged batches and reduced logits give the loss of every masked token, counted once."""
    model = tf.BertForMaskedLM(tf.BertConfig(**TINY))
    rows = [{"input_ids": rng.integers(1, 20, size).tolist()} for size in (3, 9, 4, 7, 5, 8, 6)]
    for row in rows:
        row["labels"] = [token if at % 2 else -100 for at, token in enumerate(row["input_ids"])]
        row["attention_mask"] = [1] * len(row["input_ids"])

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {
            name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])
            for name, value in fill.items()
        }

    trainer = tf.Trainer(
        model,
        make_args(per_device_eval_batch_size=3),
        eval_dataset=rows,
        data_collator=collate,
        compute_metrics=compute_metrics_for("MASKED_LM"),
        preprocess_logits_for_metrics=preprocess_logits_for_metrics("MASKED_LM"),
    )
    found = trainer.evaluate()
    batch = collate(rows)
    with torch.no_grad():
        outputs = model.eval()(**batch)
    kept = batch["labels"] != -100
    accuracy = (outputs.logits.argmax(-1)[kept] == batch["labels"][kept]).double().mean().item()
    assert found["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)  # not a mean of the means of batches
    assert found["eval_accuracy"] == pytest.approx(accuracy)
    assert found["eval_perplexity"] == pytest.approx(math.exp(outputs.loss.item()), rel=1e-5)
