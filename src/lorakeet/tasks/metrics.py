"""Metrics of each task: functions of arrays, and :func:`compute_metrics_for` for a Trainer.

Labels of -100 (:data:`lorakeet.ignore_index.IGNORE_INDEX`) never count, except in regression, where -100 is a number like
any other. All metrics are shares between 0 and 1 unless stated otherwise. scikit-learn and scipy compute the standard
metrics.
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
from lorakeet.errors import MissingLibraryError
from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.inference.answers import chosen_labels
from lorakeet.log import warn
from lorakeet.tasks.retrieval import retrieval
from lorakeet.tasks.text_metrics import (
    Figures,
    answering,
    exact_match,
    has_spans,
    nothing_to_measure,
    rouge,
    span_f1,
)

Array = NDArray[Any]


# ---- SEQ_CLS ----------------------------------------------------------------------------------------------------


def single_label(scores: Array, labels: Array) -> Figures:
    """Compute ``accuracy`` and ``macro_f1`` (over the classes that occur in labels or predictions).

    Args:
        scores: [N, C] logits, or [N] ids of the predicted classes.
        labels: int [N].

    Raises:
        DataError: Every label is ignored.
    """
    predicted, right = _kept(_best(scores, labels), labels)
    return {"accuracy": float((predicted == right).mean()), "macro_f1": _macro_f1(predicted, right)}


def multi_label(logits: Array, labels: Array) -> Figures:
    """Compute ``micro_f1``, ``macro_f1`` (over all labels) and ``exact_match`` of labels whose sigmoid is above 0.5.

    Args:
        logits: [N, C].
        labels: [N, C] of 0 and 1.

    Raises:
        DataError: Every label is ignored.
    """
    allow_sklearn()
    from sklearn.metrics import f1_score

    counts = labels != IGNORE_INDEX
    if not counts.any():
        raise nothing_to_measure(labels)
    predicted, right = chosen_labels(logits) & counts, (labels > 0.5) & counts
    return {
        "micro_f1": float(f1_score(right, predicted, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(right, predicted, average="macro", zero_division=0)),
        "exact_match": float((predicted == right)[counts.any(1)].all(1).mean()),
    }


def regression(values: Array, labels: Array) -> Figures:
    """Compute ``mse``, ``mae``, and the correlations ``pearson`` and ``spearman`` where values and labels both vary.

    Args:
        values: [N] or [N, 1].
        labels: [N] floats in the same unit.

    Raises:
        DataError: There are no labels.
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
    """Compute ``accuracy`` and ``macro_f1`` (over the tags that occur).

    Args:
        scores: [N, T, C] logits, or [N, T] ids of the predicted tags.
        labels: int [N, T], -100 for padding and for all but the first token of a word.

    Raises:
        DataError: Every label is ignored.
    """
    predicted, right = _kept(_best(scores, labels), labels)
    return {"accuracy": float((predicted == right).mean()), "macro_f1": _macro_f1(predicted, right)}


# ---- SEQ_2_SEQ_LM and MASKED_LM ---------------------------------------------------------------------------------


def token_prediction(scores: Array, labels: Array, losses: Array | None = None) -> Figures:
    """Compute ``accuracy`` at the labeled positions; from logits or losses also ``loss`` (nats per token), ``perplexity``.

    Args:
        scores: [N, T, V] logits, or [N, T] ids of the most likely tokens.
        labels: int [N, T].
        losses: fp [N, T]; None: computed if ``scores`` are logits.

    Raises:
        DataError: Every label is ignored.
    """
    predicted, right = _kept(_best(scores, labels), labels)
    figures = {"accuracy": float((predicted == right).mean())}
    if losses is None and scores.ndim > labels.ndim:
        logits = scores[labels != IGNORE_INDEX].astype(np.float64)
        highest = logits.max(1)
        norms = highest + np.log(np.exp(logits - highest[:, None]).sum(1))
        total = float((norms - logits[np.arange(len(right)), right]).sum())
    elif losses is not None:
        total = float(losses[labels != IGNORE_INDEX].sum(dtype=np.float64))
    else:
        return figures
    both = loss_and_perplexity(total, len(right))
    return {**figures, "loss": both["loss"], "perplexity": both["perplexity"]}


# ---- QUESTION_ANS, without the texts ----------------------------------------------------------------------------


def positions(starts: Array, ends: Array, right_starts: Array, right_ends: Array) -> Figures:
    """Compute ``exact_match`` and ``f1`` of answers as token positions, without their texts.

    Args:
        starts, ends: int [N], first and last token of the predicted answers.
        right_starts, right_ends: int [N], the same of the right answers.

    Raises:
        DataError: There are no answers.
    """
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
    """Return the ``compute_metrics`` of a Trainer for a task.

    It accepts predictions as logits or as :func:`preprocess_logits_for_metrics` returns them; answers and generated texts
    also as lists of texts. For FEATURE_EXTRACTION anchors are the predictions and positives the labels, or both are the
    predictions. Span F1 and ROUGE are skipped with a warning if their library is not installed.

    Args:
        task: A concrete name of :data:`lorakeet.config.TaskName`.
        problem: Problem of SEQ_CLS: single_label (also None), multi_label or regression.
        labels: Names of the classes or tags by id; tags that mark spans get span metrics.
        tokenizer: Decodes generated ids.
    """

    def compute(given: EvalPrediction) -> Figures:
        predicted, right = given.predictions, given.label_ids
        if task == "SEQ_CLS":
            metrics: Mapping[str | None, Any] = {"multi_label": multi_label, "regression": regression}
            return metrics.get(problem, single_label)(_first(predicted), right)
        if task == "TOKEN_CLS":
            best = _best(_first(predicted), right)
            figures = tagging(best, right)
            if labels is not None and has_spans(labels):
                figures |= _if_installed(span_f1, _named(best, right, labels), _named(right, right, labels))
            return figures
        if task == "QUESTION_ANS":
            return answering(predicted, right) if _are_texts(predicted) else positions(*_spans(predicted), *right)
        if task == "FEATURE_EXTRACTION":
            return retrieval(*(predicted if isinstance(predicted, tuple) else (predicted, right)))
        if task == "SEQ_2_SEQ_LM" and (_are_texts(predicted) or (tokenizer is not None and _are_ids(predicted))):
            texts, targets = (_texts(part, tokenizer) for part in (predicted, right))
            return exact_match(texts, targets) | _if_installed(rouge, texts, targets)
        losses = predicted[1] if isinstance(predicted, tuple) and predicted[1].shape == right.shape else None
        return token_prediction(_first(predicted), right, losses)

    return compute


def preprocess_logits_for_metrics(task: str) -> Callable[[Any, Any], Any] | None:
    """Return the function that reduces each batch's logits to what a Trainer has to keep of them.

    TOKEN_CLS keeps the most likely tags [B, T]. MASKED_LM and SEQ_2_SEQ_LM keep the most likely tokens [B, T] and the
    loss at each position [B, T], in place of [B, T, vocabulary]. None for the other tasks: they keep their logits.
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


# ---- shared helpers ---------------------------------------------------------------------------------------------


def _best(scores: Array, labels: Array) -> Array:
    """Return the ids of the highest scores, unless ``scores`` are ids already."""
    return scores.argmax(-1) if scores.ndim > labels.ndim else scores


def _kept(predicted: Array, labels: Array) -> tuple[Array, Array]:
    """Return both without the positions labeled -100: [number of labels]."""
    counts = labels != IGNORE_INDEX
    if not counts.any():
        raise nothing_to_measure(labels)
    return predicted[counts], labels[counts]


def _macro_f1(predicted: Array, right: Array) -> float:
    allow_sklearn()
    from sklearn.metrics import f1_score

    return float(f1_score(right, predicted, average="macro", zero_division=0))


def _first(predicted: Any) -> Any:
    """Return the logits of a model that returns more than logits."""
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
    """Return first and last token of the answers, from their positions [N] or their logits [N, T]."""
    return [part.argmax(-1) if part.ndim == 2 else part for part in predicted[:2]]


def _named(ids: Array, right: Array, names: Sequence[str]) -> list[list[str]]:
    return [[names[number] for number in row[label != IGNORE_INDEX]] for row, label in zip(ids, right, strict=True)]


def _if_installed(figures: Callable[..., Figures], *rest: Any) -> Figures:
    try:
        return figures(*rest)
    except MissingLibraryError as error:
        _warn_skipped(figures.__name__, error.message, str(error.hint))
        return {}


@cache
def _warn_skipped(metric: str, why: str, hint: str) -> None:
    """Warn once that a metric is skipped, however often it is measured."""
    warn(f"{metric} is skipped: {why} ({hint})")


def loss_and_perplexity(total: float, tokens: int) -> dict[str, float | int]:
    """Return ``{"loss", "perplexity", "tokens"}`` of a sum of losses; perplexity is exp(loss)."""
    loss = total / tokens if tokens else math.nan
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}
