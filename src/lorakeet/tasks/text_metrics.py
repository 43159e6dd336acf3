"""Metrics of texts: spans among tags, answers to questions, and generated texts.

All are shares between 0 and 1. ``rouge-score`` computes ROUGE, and ``nervaluate`` the F1 of spans (extra ``metrics``).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lorakeet.errors import DataError, MissingLibraryError

Figures = dict[str, float]


# ---- spans among tags -------------------------------------------------------------------------------------------


def has_spans(names: Sequence[str]) -> bool:
    """Whether tags mark spans: all are ``O`` or begin with ``B-``, ``I-``, ``E-``, ``S-`` (or ``L-``, ``U-``)."""
    prefixes = [_SPAN.fullmatch(name) for name in names if name != "O"]
    return all(prefixes) and any(match and match[1] in "BI" for match in prefixes)


_SPAN = re.compile(r"([BIESLU])-(.+)")


def span_f1(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Figures:
    """Compute ``span_precision``, ``span_recall`` and ``span_f1``.

    A span counts if its first word, its last word and its type are right.

    Args:
        predicted, right: Tags of each sentence, as BIO, IOB, BIOES or BILOU. A sequence that its scheme does not allow is
            read as by the CoNLL evaluation: a tag that cannot continue a span begins one.

    Raises:
        MissingLibraryError: nervaluate is not installed.
    """
    evaluator = _library("nervaluate").Evaluator
    as_bio = [[_bio(tags) for tags in sentences] for sentences in (right, predicted)]
    types = sorted({tag[2:] for sentences in as_bio for tags in sentences for tag in tags if tag != "O"})
    if not types:
        return {"span_precision": 0.0, "span_recall": 0.0, "span_f1": 0.0}
    strict = evaluator(*as_bio, tags=types, loader="list").evaluate()["overall"]["strict"]
    figures = {"span_precision": strict.precision, "span_recall": strict.recall, "span_f1": strict.f1}
    return {name: float(value) for name, value in figures.items()}


def _bio(tags: Sequence[str]) -> list[str]:
    """Return the tags with every span as ``B-`` and then ``I-``."""
    found, before = [], ("O", "")
    for tag in tags:
        match = _SPAN.fullmatch(tag)
        if match is None:
            found.append("O")
            before = ("O", "")
            continue
        prefix, span_type = match[1], match[2]
        begins = prefix in "BSU" or before[0] in "OESLU" or before[1] != span_type
        found.append(f"{'B' if begins else 'I'}-{span_type}")
        before = (prefix, span_type)
    return found


# ---- QUESTION_ANS -----------------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalized_answer(text: str) -> str:
    """Normalize an answer: no case, ASCII punctuation, English articles or runs of white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answering(predicted: Sequence[str], right: Sequence[str | Sequence[str]]) -> Figures:
    """Compute ``exact_match`` and ``f1`` of SQuAD (arXiv:1606.05250, section 6.1; no answer: arXiv:1806.03822).

    F1 compares the bags of words of both normalized answers; of several right answers the best counts. "No answer" is
    the empty text, which is right only for a question without an answer.

    Args:
        predicted: A text for each question.
        right: The answer or the answers of each question; an empty list or an empty text for none.

    Raises:
        DataError: There are no questions.
    """
    if not len(right):
        raise nothing_to_measure(right)
    exact, overlap = 0.0, 0.0
    for guess, answers in zip(predicted, right, strict=True):
        texts = [answers] if isinstance(answers, str) else answers
        words = [normalized_answer(answer).split() for answer in texts]
        right_words = [each for each in words if each] or [[]]
        guessed = normalized_answer(guess).split()
        exact += max(guessed == each for each in right_words)
        overlap += max(_bag_f1(guessed, each) for each in right_words)
    return {"exact_match": exact / len(right), "f1": overlap / len(right)}


def _bag_f1(guessed: list[str], right: list[str]) -> float:
    if not guessed or not right:
        return float(guessed == right)
    shared = (Counter(guessed) & Counter(right)).total()
    return 2 * shared / (len(guessed) + len(right))


# ---- generated texts --------------------------------------------------------------------------------------------


def exact_match(texts: Sequence[str], right: Sequence[str]) -> Figures:
    """Compute ``exact_match``, the share of texts that equal the right ones; white space around them is ignored."""
    if not len(right):
        raise nothing_to_measure(right)
    return {"exact_match": sum(a.strip() == b.strip() for a, b in zip(texts, right, strict=True)) / len(right)}


class _Words:
    """Tokenizer of rouge-score (letters and digits, in lower case) for every script, not only for English."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        """Split a text into words."""
        return re.findall(r"[^\W_]+", text.lower())


def rouge(texts: Sequence[str], right: Sequence[str]) -> Figures:
    """Compute ``rouge1``, ``rouge2`` and ``rougeL``, mean F1 without stemming (Lin 2004).

    Reference: https://aclanthology.org/W04-1013.

    Raises:
        DataError: There are no texts.
        MissingLibraryError: rouge-score is not installed.
    """
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(names, tokenizer=_Words())
    if not len(right):
        raise nothing_to_measure(right)
    scores = [scorer.score(target, text) for text, target in zip(texts, right, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


# ---- shared helpers ---------------------------------------------------------------------------------------------


def nothing_to_measure(labels: Any) -> DataError:
    """Return the error that every label is ignored."""
    return DataError(f"there is nothing to measure: no label among {len(labels)} rows", "give rows with labels")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise MissingLibraryError(f"{package} is not installed", "pip install 'lorakeet[metrics]'") from None
