"""Answers in a model's outputs: classes, tags, spans. Predictions and held-out figures decode them here, by one rule.

The answer to a question is the most likely span of its context over all windows. The score of a span is the sum of the
log-probabilities of its start and its end. A window whose "no answer" is at least as likely as each of its spans has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.ignore_index import IGNORE_INDEX


def chosen_labels(logits: Any) -> Any:
    """Return which labels of a multi-label classifier are chosen: those whose sigmoid is above 0.5, bool [..., labels].

    Args:
        logits: A tensor or an array [..., labels].
    """
    return logits > 0


def class_answer(logits: Tensor, problem: str | None, names: Mapping[int, str]) -> dict[str, Any]:
    """Return the answer of a classifier to one text.

    Args:
        logits: [classes].
        problem: As in the model's configuration: regression, multi_label_classification, or a single label.
        names: Of the classes, by number.

    Returns:
        ``{"label", "score", "scores"}``; multi-label ``{"labels", "scores"}``; regression ``{"value"}``.
    """
    logits = logits.float()
    if problem == "regression":
        return {"value": float(logits[0])}
    if problem == "multi_label_classification":
        chosen = [names[number] for number in chosen_labels(logits).nonzero()[:, 0].tolist()]
        return {"labels": chosen, "scores": _table(logits.sigmoid(), names)}
    best, scores = int(logits.argmax()), logits.softmax(-1)
    return {"label": names[best], "score": float(scores[best]), "scores": _table(scores, names)}


def _table(scores: Tensor, names: Mapping[int, str]) -> dict[str, float]:
    """Return the score of each name, the highest first."""
    order = scores.argsort(descending=True, stable=True).tolist()
    return {names[number]: float(scores[number]) for number in order}


@dataclass(frozen=True)
class Tag:
    """Tag of a word.

    Attributes:
        word: Number of the word.
        tag: Number of the tag.
        score: Its probability.
    """

    word: int
    tag: int
    score: float


def word_tags(logits: Tensor, words: Tensor) -> list[Tag]:
    """Return the tag of each word, which is that of its first token.

    Args:
        logits: [tokens, tags].
        words: int [tokens], the number of the word that begins with a token, -100 for every other token.
    """
    first = words.ne(IGNORE_INDEX)
    scores = logits[first].float()
    best, numbers = scores.argmax(-1), words[first].tolist()
    likely = scores.softmax(-1).gather(1, best[:, None])[:, 0]
    return [Tag(*each) for each in zip(numbers, best.tolist(), likely.tolist(), strict=True)]


@dataclass(frozen=True)
class WindowAnswer:
    """Answer in one window of a context.

    Attributes:
        row: Number of the question.
        start, end: Its characters in the context; both 0 where the window has no answer.
        score: Log-probability of the answer, or of "no answer".
        no_answer: Log-probability of "no answer".
    """

    row: int
    start: int
    end: int
    score: float
    no_answer: float

    @property
    def found(self) -> bool:
        """Whether the window has an answer."""
        return self.end > 0


def span_logits(outputs: Any, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of each token as start and as end of the answer, fp32 [B, T]; padding is no candidate.

    Args:
        outputs: Of the model, with ``start_logits`` and ``end_logits``.
        padding: Bool [B, T].
    """
    both = (outputs.start_logits, outputs.end_logits)
    start, end = (logits.float().masked_fill(padding, torch.finfo(torch.float32).min) for logits in both)
    return start, end


def window_answers(start_logits: Tensor, end_logits: Tensor, batch: Mapping[str, Tensor]) -> list[WindowAnswer]:
    """Return the answer in each window of a batch.

    Args:
        start_logits: fp [B, T], padding excluded.
        end_logits: fp [B, T], likewise.
        batch: ``row`` and ``no_answer`` [B], ``starts`` and ``ends`` [B, T] (see
            :meth:`lorakeet.data.encode.question.QuestionEncoder.answer_columns`).
    """
    log_starts, log_ends = (logits.float().log_softmax(-1).cpu() for logits in (start_logits, end_logits))
    starts, ends, nowhere, rows = (batch[name].cpu() for name in ("starts", "ends", "no_answer", "row"))
    outside = starts.lt(0)
    # the best end at or after each start: a running maximum from the right
    best_ends, at = log_ends.masked_fill(outside, -math.inf).flip(1).cummax(1)
    best_ends, at = best_ends.flip(1), starts.shape[1] - 1 - at.flip(1)
    scores, first = (log_starts.masked_fill(outside, -math.inf) + best_ends).max(1)
    last = at.gather(1, first[:, None])[:, 0]
    none = (log_starts + log_ends).gather(1, nowhere[:, None])[:, 0]
    found = []
    for window in range(len(starts)):
        score, without = float(scores[window]), float(none[window])
        span = (0, 0)
        if score > without:
            span = int(starts[window, first[window]]), int(ends[window, last[window]])
        found.append(WindowAnswer(int(rows[window]), *span, max(score, without), without))
    return found


def best_answers(windows: Iterable[WindowAnswer]) -> dict[int, WindowAnswer]:
    """Return the best answer of each question over all of its windows, in the order of the questions.

    Without an answer in any window it is the least likely "no answer", as in SQuAD 2 (arXiv:1806.03822).
    """
    best: dict[int, WindowAnswer] = {}
    for window in windows:
        known = best.setdefault(window.row, window)
        if window.found != known.found:
            is_better = window.found
        else:
            is_better = window.score > known.score if window.found else window.score < known.score
        if is_better:
            best[window.row] = window
    return dict(sorted(best.items()))


def answer_texts(answers: Mapping[int, WindowAnswer], contexts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the text of each answer, empty for none.

    Args:
        answers: By number of the question.
        contexts: Rows with ``context``, by number of the question.
    """
    return [contexts[number]["context"][answer.start : answer.end] for number, answer in answers.items()]
