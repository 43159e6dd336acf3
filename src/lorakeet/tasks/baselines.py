"""What a task's figures are to be held against: predictions that need no model, or only a count of words.

Each baseline learns from the training part and is measured on the held-out part with the figures of the task itself
(:func:`lorakeet.tasks.metrics.compute_metrics_for`). :func:`baselines_for` is all that fit a task, :func:`baseline` the
quick one that a run is shown beside.
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

#: Columns by name, as of a ``datasets.Dataset``.
Rows: TypeAlias = Mapping[str, Sequence[Any]] | datasets.Dataset

#: Texts that a baseline of words learns from at most, evenly chosen: it shall not take longer than the model.
MOST = 20_000
#: Words, and every sign of its own: punctuation tells sources apart.
WORDS = r"\w+|[^\w\s]"


def baseline(task: Task, data: Prepared) -> Figures:
    """The figures that a run is shown beside: ``majority`` for SEQ_CLS, ``frequent_tag`` for TOKEN_CLS, else none.

    None also for a stream, of which nobody has counted all, and where nothing is held out.
    """
    if data.train_rows is None or data.held_out_rows is None:
        return {}
    if task.name == "SEQ_CLS":
        return majority(
            task.problem, *(targets(task, rows["label"][:]) for rows in (data.train_rows, data.held_out_rows))
        )
    return next(iter(baselines_for(task, data.train_rows, data.held_out_rows).values()), {})


def baselines_for(task: Task, train: Rows, held_out: Rows) -> dict[str, Figures]:
    """Figures of every baseline of a task, by the baseline's name; none for tasks other than SEQ_CLS and TOKEN_CLS.

    SEQ_CLS: ``majority`` (the most frequent class or set of labels, or the mean) and ``tfidf`` (words weighed by how
    rare they are, and a linear model). TOKEN_CLS: ``frequent_tag`` (each word's most frequent tag).

    Args:
        task: with its labels.
        train, held_out: canonical columns: ``text`` (and ``text_pair``) and ``label``, or ``tokens`` and ``tags``.

    Raises:
        ValueError: a label is none of the task's.
    """
    parts = (train, held_out)
    if task.name == "TOKEN_CLS":
        label_set = LabelSet(task.labels or ())
        tags = [[list(map(label_set.number, several)) for several in rows["tags"][:]] for rows in parts]
        return {"frequent_tag": frequent_tag(train["tokens"][:], tags[0], held_out["tokens"][:], tags[1], task.labels)}
    if task.name != "SEQ_CLS":
        return {}
    learned, measured = (targets(task, rows["label"][:]) for rows in parts)
    return {
        "majority": majority(task.problem, learned, measured),
        "tfidf": tfidf(task.problem, texts(train), learned, texts(held_out), measured),
    }


def majority(problem: str | None, train_labels: Array, labels: Array) -> Figures:
    """Figures of the prediction that is the same for every text: the most frequent class or set of labels, or the mean.

    Args:
        problem: single_label (also None), multi_label or regression.
        train_labels, labels: int [N]; [N, C] of 0 and 1; or floats [N].
    """
    if problem == "regression":
        constant = train_labels.mean()
    else:
        kinds, counts = np.unique(train_labels, axis=0, return_counts=True)
        constant = kinds[counts.argmax()]
    guess = np.broadcast_to(constant, labels.shape)
    return _measured("SEQ_CLS", problem, guess, labels)


def tfidf(
    problem: str | None,
    train_texts: Sequence[str],
    train_labels: Array,
    held_out_texts: Sequence[str],
    labels: Array,
) -> Figures:
    """Figures of words and pairs of words, weighed by TF-IDF, with logistic regression (or ridge regression).

    Labels as for :func:`majority`; at most :data:`MOST` texts are learned from.
    """
    allow_sklearn()
    from sklearn.feature_extraction.text import TfidfVectorizer

    some = np.unique(np.linspace(0, len(train_texts) - 1, min(MOST, len(train_texts)), dtype=int))
    targets = train_labels[some]
    if len(np.unique(targets, axis=0)) < 2:
        return majority(problem, targets, labels)
    vectorizer = TfidfVectorizer(token_pattern=WORDS, ngram_range=(1, 2), sublinear_tf=True)
    learned = vectorizer.fit_transform([train_texts[row] for row in some])
    seen = vectorizer.transform(list(held_out_texts))
    with warnings.catch_warnings():  # a label that all texts have, or none: it is predicted as such
        warnings.filterwarnings("ignore", message="Label .* is present in all training examples")
        guess = _linear_model(problem).fit(learned, targets).predict(seen)
    return _measured("SEQ_CLS", problem, guess, labels)


def _linear_model(problem: str | None) -> Any:
    allow_sklearn()
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if problem == "regression":
        return Ridge()
    if problem == "multi_label":
        return OneVsRestClassifier(LogisticRegression(C=10.0, max_iter=1000))
    return LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")  # for the sake of macro F1


def frequent_tag(
    train_tokens: Sequence[Sequence[Hashable]],
    train_tags: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[Hashable]],
    tags: Sequence[Sequence[int]],
    names: Sequence[str] | None = None,
) -> Figures:
    """Figures of the tag that each word had most often; a word never seen gets the most frequent tag of all.

    Args:
        train_tokens, tokens: words of each sentence.
        train_tags, tags: number of each word's tag.
        names: of the tags, by number; if they mark spans, these are measured too.
    """
    by_word: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for words, numbered in zip(train_tokens, train_tags, strict=True):
        for word, tag in zip(words, numbered, strict=True):
            by_word[word][tag] += 1
    likely = {word: most_frequent(counts) for word, counts in by_word.items()}
    overall = most_frequent(sum(by_word.values(), Counter()))
    guess = [[likely.get(word, overall) for word in words] for words in tokens]
    return _measured("TOKEN_CLS", None, _filled(guess), _filled(tags), names)


def most_frequent(counts: Counter[int]) -> int:
    """The number counted most often, the lowest of several."""
    return min(counts, key=lambda number: (-counts[number], number))


# ---- labels and texts of canonical rows -------------------------------------------------------------------------


def targets(task: Task, labels: Sequence[Any]) -> Array:
    """int [N]; for multi_label fp [N, C] of 0 and 1; for regression fp [N]."""
    problem: Any = task.problem or "single_label"
    return np.array(list(map(LabelSet(task.labels or (), problem).target, labels)))


def texts(rows: Rows) -> list[str]:
    """The text of each row, with its second text below where there are pairs."""
    names = rows.column_names if isinstance(rows, datasets.Dataset) else rows
    firsts = rows["text"][:]
    seconds = rows["text_pair"][:] if "text_pair" in names else [None] * len(firsts)
    return [text if pair is None else f"{text}\n{pair}" for text, pair in zip(firsts, seconds, strict=True)]


def _filled(rows: Sequence[Sequence[int]]) -> Array:
    """[N, longest], short rows filled up with -100."""
    filled = np.full((len(rows), max(map(len, rows), default=0)), IGNORE_INDEX)
    for row, numbered in zip(filled, rows, strict=True):
        row[: len(numbered)] = numbered
    return filled


def _measured(
    task: str, problem: str | None, guess: Array, labels: Array, names: Sequence[str] | None = None
) -> Figures:
    return compute_metrics_for(task, problem, names)(EvalPrediction(predictions=guess, label_ids=labels))
