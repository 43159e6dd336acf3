"""Baselines of a task: predictions without a model, or from counts of words alone.

Each baseline is fitted on the training rows and measured on the held-out rows with the metrics of the task
(:func:`lorakeet.tasks.metrics.compute_metrics_for`). :func:`baselines_for` computes all baselines of a task,
:func:`baseline` the quick one that a run reports.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import numpy as np
from transformers import EvalPrediction

from lorakeet._optional_imports import allow_sklearn
from lorakeet.data.prepared import Prepared
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.tasks.metrics import Array, compute_metrics_for
from lorakeet.tasks.task import Task
from lorakeet.tasks.text_metrics import Figures

#: Columns by name, such as those of a ``datasets.Dataset``.
Rows: TypeAlias = Mapping[str, Sequence[Any]] | datasets.Dataset

#: Texts that TF-IDF is fitted on at most, evenly chosen, so that it is faster than the model.
MAX_TEXTS = 20_000
#: Tokens of TF-IDF: words, and each punctuation character, which distinguishes sources.
WORDS = r"\w+|[^\w\s]"


def baseline(task: Task, data: Prepared) -> Figures:
    """Compute the baseline that a run reports: ``majority`` for SEQ_CLS, ``frequent_tag`` for TOKEN_CLS, else none.

    A stream has none, since it is not counted to its end, nor has a run without held-out rows.
    """
    if data.train_rows is None or data.held_out_rows is None:
        return {}
    if task.name == "SEQ_CLS":
        return majority(
            task.problem, *(targets(task, rows["label"][:]) for rows in (data.train_rows, data.held_out_rows))
        )
    return next(iter(baselines_for(task, data.train_rows, data.held_out_rows).values()), {})


def baselines_for(task: Task, train: Rows, held_out: Rows) -> dict[str, Figures]:
    """Compute the metrics of every baseline of a task, by the baseline's name; empty for other tasks than these:

    - SEQ_CLS: ``majority`` (the most frequent class or set of labels, or the mean) and ``tfidf`` (a linear model of
      words weighted by TF-IDF);
    - TOKEN_CLS: ``frequent_tag`` (each word's most frequent tag).

    Args:
        task: The task, with its labels.
        train, held_out: Canonical columns: ``text`` (and ``text_pair``) and ``label``, or ``tokens`` and ``tags``.

    Raises:
        ValueError: A label is not one of the task's.
    """
    parts = (train, held_out)
    if task.name == "TOKEN_CLS":
        label_set = LabelSet(task.labels or ())
        tags = [[list(map(label_set.number, sentence)) for sentence in rows["tags"][:]] for rows in parts]
        return {"frequent_tag": frequent_tag(train["tokens"][:], tags[0], held_out["tokens"][:], tags[1], task.labels)}
    if task.name != "SEQ_CLS":
        return {}
    train_labels, labels = (targets(task, rows["label"][:]) for rows in parts)
    return {
        "majority": majority(task.problem, train_labels, labels),
        "tfidf": tfidf(task.problem, texts(train), train_labels, texts(held_out), labels),
    }


def majority(problem: str | None, train_labels: Array, labels: Array) -> Figures:
    """Measure a constant prediction: the most frequent class or set of labels, or the mean.

    Args:
        problem: single_label (also None), multi_label or regression.
        train_labels, labels: int [N]; [N, C] of 0 and 1; or floats [N].
    """
    if problem == "regression":
        constant = train_labels.mean()
    else:
        values, counts = np.unique(train_labels, axis=0, return_counts=True)
        constant = values[counts.argmax()]
    guess = np.broadcast_to(constant, labels.shape)
    return _measured("SEQ_CLS", problem, guess, labels)


def tfidf(
    problem: str | None,
    train_texts: Sequence[str],
    train_labels: Array,
    held_out_texts: Sequence[str],
    labels: Array,
) -> Figures:
    """Measure logistic regression (or ridge regression) on words and pairs of words weighted by TF-IDF.

    Args:
        problem: single_label (also None), multi_label or regression.
        train_texts: Texts to fit on; :data:`MAX_TEXTS` of them at most are used.
        train_labels, labels: as for :func:`majority`.
        held_out_texts: Texts to predict.
    """
    allow_sklearn()
    from sklearn.feature_extraction.text import TfidfVectorizer

    chosen = np.unique(np.linspace(0, len(train_texts) - 1, min(MAX_TEXTS, len(train_texts)), dtype=int))
    targets = train_labels[chosen]
    if len(np.unique(targets, axis=0)) < 2:
        return majority(problem, targets, labels)
    vectorizer = TfidfVectorizer(token_pattern=WORDS, ngram_range=(1, 2), sublinear_tf=True)
    features = vectorizer.fit_transform([train_texts[row] for row in chosen])
    held_out = vectorizer.transform(list(held_out_texts))
    with warnings.catch_warnings():  # a label of all texts, or of none, is predicted as such
        warnings.filterwarnings("ignore", message="Label .* is present in all training examples")
        guess = _linear_model(problem).fit(features, targets).predict(held_out)
    return _measured("SEQ_CLS", problem, guess, labels)


def _linear_model(problem: str | None) -> Any:
    allow_sklearn()
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if problem == "regression":
        return Ridge()
    if problem == "multi_label":
        return OneVsRestClassifier(LogisticRegression(C=10.0, max_iter=1000))
    return LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")  # balanced for macro F1


def frequent_tag(
    train_tokens: Sequence[Sequence[Hashable]],
    train_tags: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[Hashable]],
    tags: Sequence[Sequence[int]],
    names: Sequence[str] | None = None,
) -> Figures:
    """Measure the most frequent tag of each word; an unknown word gets the most frequent tag of all.

    Args:
        train_tokens, tokens: Words of each sentence.
        train_tags, tags: Id of each word's tag.
        names: Names of the tags by id; if they mark spans, these are measured too.
    """
    by_word: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for words, numbered in zip(train_tokens, train_tags, strict=True):
        for word, tag in zip(words, numbered, strict=True):
            by_word[word][tag] += 1
    likely = {word: most_frequent(counts) for word, counts in by_word.items()}
    overall = most_frequent(sum(by_word.values(), Counter()))
    guess = [[likely.get(word, overall) for word in words] for words in tokens]
    return _measured("TOKEN_CLS", None, _padded(guess), _padded(tags), names)


def most_frequent(counts: Counter[int]) -> int:
    """Return the id that was counted most often, the lowest of several."""
    return min(counts, key=lambda number: (-counts[number], number))


# ---- labels and texts of canonical rows -------------------------------------------------------------------------


def targets(task: Task, labels: Sequence[Any]) -> Array:
    """Return int [N]; for multi_label fp [N, C] of 0 and 1; for regression fp [N]."""
    problem: Any = task.problem or "single_label"
    return np.array(list(map(LabelSet(task.labels or (), problem).target, labels)))


def texts(rows: Rows) -> list[str]:
    """Return the text of each row, followed by its second text if the rows are pairs."""
    names = rows.column_names if isinstance(rows, datasets.Dataset) else rows
    firsts = rows["text"][:]
    seconds = rows["text_pair"][:] if "text_pair" in names else [None] * len(firsts)
    return [text if pair is None else f"{text}\n{pair}" for text, pair in zip(firsts, seconds, strict=True)]


def _padded(rows: Sequence[Sequence[int]]) -> Array:
    """Return [N, longest], short rows padded with -100."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), IGNORE_INDEX)
    for row, numbered in zip(padded, rows, strict=True):
        row[: len(numbered)] = numbered
    return padded


def _measured(
    task: str, problem: str | None, guess: Array, labels: Array, names: Sequence[str] | None = None
) -> Figures:
    return compute_metrics_for(task, problem, names)(EvalPrediction(predictions=guess, label_ids=labels))
