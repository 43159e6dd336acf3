"""The figures that people expect of each task: functions of arrays, and :func:`compute_metrics_for` for a Trainer.

Labels of -100 (:data:`lorakeet.ignore_index.IGNORE_INDEX`) count nowhere, but for regression, where -100 is a number as any.
All figures are shares between 0 and 1 unless said otherwise. What is standard is computed by scikit-learn and scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction

from lorakeet._optional_imports import allow_sklearn
from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.log import warn
from lorakeet.tasks.text_metrics import (
    Figures,
    MissingLibraryError,
    answering,
    exact_match,
    has_spans,
    nothing_to_measure,
    rouge,
    span_f1,
)

Array = NDArray[Any]

#: Cosine similarities nearer than this are a tie.
TIE = 1e-6
#: Anchors compared with all positives at once.
CHUNK = 1024


# ---- SEQ_CLS ----------------------------------------------------------------------------------------------------


def single_label(scores: Array, labels: Array) -> Figures:
    """``accuracy`` and ``macro_f1`` (over the classes that occur in labels or predictions).

    Args:
        scores: [N, C] logits, or [N] numbers of the predicted classes.
        labels: int [N].

    Raises:
        DataError: no label is left.
    """
    predicted, right = _kept(_best(scores, labels), labels)
    return {"accuracy": float((predicted == right).mean()), "macro_f1": _macro_f1(predicted, right)}


def multi_label(logits: Array, labels: Array) -> Figures:
    """``micro_f1``, ``macro_f1`` (over all labels) and ``exact_match``; a label is predicted where its sigmoid is over 0.5.

    Args:
        logits: [N, C].
        labels: [N, C] of 0 and 1.

    Raises:
        DataError: no label is left.
    """
    allow_sklearn()
    from sklearn.metrics import f1_score

    counts = labels != IGNORE_INDEX
    if not counts.any():
        raise nothing_to_measure(labels)
    predicted, right = (logits > 0) & counts, (labels > 0.5) & counts
    return {
        "micro_f1": float(f1_score(right, predicted, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(right, predicted, average="macro", zero_division=0)),
        "exact_match": float((predicted == right)[counts.any(1)].all(1).mean()),
    }


def regression(values: Array, labels: Array) -> Figures:
    """``mse``, ``mae``, and the correlations ``pearson`` and ``spearman`` where values and labels both vary.

    Args:
        values: [N] or [N, 1].
        labels: the same number of floats, in the same unit.

    Raises:
        DataError: there are no labels.
    """
    allow_sklearn()
    from scipy.stats import pearsonr, spearmanr

    guess, right = np.asarray(values, np.float64).reshape(-1), np.asarray(labels, np.float64).reshape(-1)
    if not len(right):
        raise nothing_to_measure(right)
    figures = {"mse": float(((guess - right) ** 2).mean()), "mae": float(np.abs(guess - right).mean())}
    if np.ptp(guess) > 0 and np.ptp(right) > 0:
        figures["pearson"] = float(pearsonr(guess, right).statistic)
        figures["spearman"] = float(spearmanr(guess, right).statistic)
    return figures


# ---- TOKEN_CLS --------------------------------------------------------------------------------------------------


def tagging(scores: Array, labels: Array) -> Figures:
    """``accuracy`` and ``macro_f1`` (over the tags that occur).

    Args:
        scores: [N, T, C] logits, or [N, T] numbers of the predicted tags.
        labels: int [N, T], -100 where nothing is to be said: padding, and all but the first piece of a word.

    Raises:
        DataError: no label is left.
    """
    predicted, right = _kept(_best(scores, labels), labels)
    return {"accuracy": float((predicted == right).mean()), "macro_f1": _macro_f1(predicted, right)}


# ---- SEQ_2_SEQ_LM and MASKED_LM ---------------------------------------------------------------------------------


def token_prediction(scores: Array, labels: Array, losses: Array | None = None) -> Figures:
    """``accuracy`` at the labelled positions, and ``loss`` (nats per token) and ``perplexity`` where they can be known.

    Args:
        scores: [N, T, V] logits, or [N, T] numbers of the likeliest tokens.
        labels: int [N, T].
        losses: fp [N, T]; left out: computed, if ``scores`` are logits.

    Raises:
        DataError: no label is left.
    """
    predicted, right = _kept(_best(scores, labels), labels)
    figures = {"accuracy": float((predicted == right).mean())}
    if losses is None and scores.ndim > labels.ndim:
        some = scores[labels != IGNORE_INDEX].astype(np.float64)
        highest = some.max(1)
        norms = highest + np.log(np.exp(some - highest[:, None]).sum(1))
        total = float((norms - some[np.arange(len(right)), right]).sum())
    elif losses is not None:
        total = float(losses[labels != IGNORE_INDEX].sum(dtype=np.float64))
    else:
        return figures
    both = loss_and_perplexity(total, len(right))
    return {**figures, "loss": both["loss"], "perplexity": both["perplexity"]}


# ---- FEATURE_EXTRACTION -----------------------------------------------------------------------------------------


def retrieval(anchors: Array, positives: Array) -> Figures:
    """``accuracy_at_1`` and ``mrr`` (mean reciprocal rank) of each anchor's own positive among all, by cosine similarity.

    Equal similarities are broken by chance, and what is returned is the expected value: a model that gives every text the
    same vector gets 1/N, and not 1.

    Args:
        anchors, positives: [N, hidden]; row i belongs to row i.

    Raises:
        DataError: there are no pairs.
    """
    if not len(anchors):
        raise nothing_to_measure(anchors)
    left, right = (_unit(vectors) for vectors in (anchors, positives))
    first, reciprocal = 0.0, 0.0
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(left) + 1))])  # 1 + 1/2 + … + 1/n
    for start in range(0, len(left), CHUNK):
        some = left[start : start + CHUNK] @ right.T  # [≤CHUNK, N]
        own = some[np.arange(len(some)), np.arange(start, start + len(some))][:, None]
        above = (some > own + TIE).sum(1)
        level = (np.abs(some - own) <= TIE).sum(1)  # itself among them
        first += float(((above == 0) / level).sum())
        reciprocal += float(((harmonic[above + level] - harmonic[above]) / level).sum())
    return {"accuracy_at_1": first / len(left), "mrr": reciprocal / len(left)}


def _unit(vectors: Array) -> Array:
    floats = np.asarray(vectors, np.float64)
    return floats / np.maximum(np.linalg.norm(floats, axis=1, keepdims=True), 1e-12)


# ---- QUESTION_ANS, where texts are not at hand ------------------------------------------------------------------


def positions(starts: Array, ends: Array, right_starts: Array, right_ends: Array) -> Figures:
    """``exact_match`` and ``f1`` of answers as positions of tokens, where their texts are not at hand; all int [N]."""
    if not len(right_starts):
        raise nothing_to_measure(right_starts)
    shared = np.minimum(ends, right_ends) - np.maximum(starts, right_starts) + 1
    lengths = np.maximum(ends - starts + 1, 0) + right_ends - right_starts + 1
    exact = (starts == right_starts) & (ends == right_ends)
    return {"exact_match": float(exact.mean()), "f1": float((2 * np.maximum(shared, 0) / lengths).mean())}


# ---- for a Trainer ----------------------------------------------------------------------------------------------


def compute_metrics_for(
    task: str, problem: str | None = None, labels: Sequence[str] | None = None, tokenizer: Any = None
) -> Callable[[EvalPrediction], Figures]:
    """The ``compute_metrics`` of a Trainer that learns ``task``.

    It takes predictions as logits or as what :func:`preprocess_logits_for_metrics` makes of them; answers and written texts
    also as lists of texts; for FEATURE_EXTRACTION anchors are the predictions and positives the labels, or both are the
    predictions. Span F1 and ROUGE are left out, and that is said, where their library is not installed.

    Args:
        task: a concrete name of :data:`lorakeet.config.TaskName`.
        problem: kind of SEQ_CLS: single_label (also None), multi_label or regression.
        labels: names of the classes or tags by number; tags that mark spans get span figures.
        tokenizer: turns generated ids into texts.
    """

    def compute(given: EvalPrediction) -> Figures:
        predicted, right = given.predictions, given.label_ids
        if task == "SEQ_CLS":
            kind: Mapping[str | None, Any] = {"multi_label": multi_label, "regression": regression}
            return kind.get(problem, single_label)(_first(predicted), right)
        if task == "TOKEN_CLS":
            best = _best(_first(predicted), right)
            figures = tagging(best, right)
            if labels is not None and has_spans(labels):
                figures |= _if_there(span_f1, _named(best, right, labels), _named(right, right, labels))
            return figures
        if task == "QUESTION_ANS":
            return answering(predicted, right) if _are_texts(predicted) else positions(*_spans(predicted), *right)
        if task == "FEATURE_EXTRACTION":
            return retrieval(*(predicted if isinstance(predicted, tuple) else (predicted, right)))
        if task == "SEQ_2_SEQ_LM" and (_are_texts(predicted) or (tokenizer is not None and _are_ids(predicted))):
            texts, targets = (_texts(part, tokenizer) for part in (predicted, right))
            return exact_match(texts, targets) | _if_there(rouge, texts, targets)
        losses = predicted[1] if isinstance(predicted, tuple) and predicted[1].shape == right.shape else None
        return token_prediction(_first(predicted), right, losses)

    return compute


def preprocess_logits_for_metrics(task: str) -> Callable[[Any, Any], Any] | None:
    """What a Trainer keeps of each batch's logits until the end, where that is much less than the logits.

    For TOKEN_CLS the likeliest tags [B, T]; for MASKED_LM and SEQ_2_SEQ_LM the likeliest tokens [B, T] and the loss at each
    position [B, T] in place of [B, T, vocabulary]; None, which is "as they are", for the others.
    """
    if task == "TOKEN_CLS":
        return lambda logits, labels: _first(logits).argmax(-1)
    if task not in ("MASKED_LM", "SEQ_2_SEQ_LM"):
        return None

    def best_and_losses(logits: Any, labels: Any) -> Any:
        from torch.nn.functional import cross_entropy

        scores = _first(logits)
        flat = cross_entropy(
            scores.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return scores.argmax(-1), flat.view_as(labels)

    return best_and_losses


# ---- what they share --------------------------------------------------------------------------------------------


def _best(scores: Array, labels: Array) -> Array:
    """The numbers of the highest scores, unless ``scores`` are numbers already."""
    return scores.argmax(-1) if scores.ndim > labels.ndim else scores


def _kept(predicted: Array, labels: Array) -> tuple[Array, Array]:
    """Both without what is labelled -100: [number of labels]."""
    counts = labels != IGNORE_INDEX
    if not counts.any():
        raise nothing_to_measure(labels)
    return predicted[counts], labels[counts]


def _macro_f1(predicted: Array, right: Array) -> float:
    allow_sklearn()
    from sklearn.metrics import f1_score

    return float(f1_score(right, predicted, average="macro", zero_division=0))


def _first(predicted: Any) -> Any:
    """The logits of a model that returns more than them."""
    return predicted[0] if isinstance(predicted, (tuple, list)) else predicted


def _are_texts(predicted: Any) -> bool:
    return len(predicted) > 0 and isinstance(predicted[0], str)


def _are_ids(predicted: Any) -> bool:
    return isinstance(predicted, np.ndarray) and predicted.ndim == 2 and np.issubdtype(predicted.dtype, np.integer)


def _texts(ids: Any, tokenizer: Any) -> list[str]:
    if _are_texts(ids):
        return list(ids)
    return [tokenizer.decode(row[row != IGNORE_INDEX], skip_special_tokens=True) for row in ids]


def _spans(predicted: tuple[Array, Array]) -> list[Array]:
    """First and last token of the answers, from their numbers [N] or their logits [N, T]."""
    return [part.argmax(-1) if part.ndim == 2 else part for part in predicted[:2]]


def _named(ids: Array, right: Array, names: Sequence[str]) -> list[list[str]]:
    return [[names[number] for number in row[label != IGNORE_INDEX]] for row, label in zip(ids, right, strict=True)]


def _if_there(figures: Callable[..., Figures], *rest: Any) -> Figures:
    try:
        return figures(*rest)
    except MissingLibraryError as error:
        _left_out(figures.__name__, error.message, str(error.hint))
        return {}


@cache
def _left_out(what: str, why: str, hint: str) -> None:
    """Said once, however often it is measured."""
    warn(f"{what} is left out: {why} ({hint})")


def loss_and_perplexity(total: float, tokens: int) -> dict[str, float | int]:
    """``{"loss", "perplexity", "tokens"}`` from a sum of losses; perplexity is exp(loss)."""
    loss = total / tokens if tokens else math.nan
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}
