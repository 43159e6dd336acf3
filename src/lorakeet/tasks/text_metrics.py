"""The figures of texts: spans among tags, answers to questions, and what a model writes.

All are shares between 0 and 1. ROUGE is computed by ``rouge-score``, the F1 of spans by ``nervaluate`` (extra ``metrics``).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lorakeet.errors import DataError, LorakeetError

Figures = dict[str, float]


class MissingLibraryError(LorakeetError, ImportError):
    """A figure needs a library that is not installed."""


# ---- spans among tags -------------------------------------------------------------------------------------------


def has_spans(names: Sequence[str]) -> bool:
    """Whether tags mark spans: all are ``O`` or begin with ``B-``, ``I-``, ``E-``, ``S-`` (or ``L-``, ``U-``)."""
    prefixes = [_SPAN.fullmatch(name) for name in names if name != "O"]
    return all(prefixes) and any(match and match[1] in "BI" for match in prefixes)


_SPAN = re.compile(r"([BIESLU])-(.+)")


def span_f1(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Figures:
    """``span_precision``, ``span_recall`` and ``span_f1``: a span counts if its first and last word and its type are right.

    Args:
        predicted, right: tags of each sentence, as BIO, IOB, BIOES or BILOU. A sequence that its scheme does not allow is
            read as the CoNLL evaluation does: a tag that cannot go on with a span begins one.

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
    """``tags`` with every span as ``B-`` and then ``I-``."""
    found, before = [], ("O", "")
    for tag in tags:
        match = _SPAN.fullmatch(tag)
        if match is None:
            found.append("O")
            before = ("O", "")
            continue
        prefix, kind = match[1], match[2]
        begins = prefix in "BSU" or before[0] in "OESLU" or before[1] != kind
        found.append(f"{'B' if begins else 'I'}-{kind}")
        before = (prefix, kind)
    return found


# ---- QUESTION_ANS -----------------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalized_answer(text: str) -> str:
    """``text`` without case, ASCII punctuation, English articles and runs of white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answering(predicted: Sequence[str], right: Sequence[str | Sequence[str]]) -> Figures:
    """``exact_match`` and ``f1`` as SQuAD defines them (arXiv:1606.05250, section 6.1; no answer: arXiv:1806.03822).

    F1 is of the bags of words of both answers, each normalised; of several right answers the best counts. No answer is the
    empty text, which is only right where nothing is.

    Args:
        predicted: one text a question.
        right: the answer or the answers of each question; an empty list or an empty text for none.

    Raises:
        DataError: there are no questions.
    """
    if not len(right):
        raise nothing_to_measure(right)
    exact, overlap = 0.0, 0.0
    for guess, answers in zip(predicted, right, strict=True):
        several = [answers] if isinstance(answers, str) else answers
        words = [normalized_answer(answer).split() for answer in several]
        wanted = [one for one in words if one] or [[]]
        guessed = normalized_answer(guess).split()
        exact += max(guessed == one for one in wanted)
        overlap += max(_bag_f1(guessed, one) for one in wanted)
    return {"exact_match": exact / len(right), "f1": overlap / len(right)}


def _bag_f1(guessed: list[str], right: list[str]) -> float:
    if not guessed or not right:
        return float(guessed == right)
    shared = (Counter(guessed) & Counter(right)).total()
    return 2 * shared / (len(guessed) + len(right))


# ---- written texts ----------------------------------------------------------------------------------------------


def exact_match(texts: Sequence[str], right: Sequence[str]) -> Figures:
    """``exact_match``: the share of texts that are right to the letter, white space around them aside."""
    if not len(right):
        raise nothing_to_measure(right)
    return {"exact_match": sum(a.strip() == b.strip() for a, b in zip(texts, right, strict=True)) / len(right)}


class _Words:
    """rouge-score's words (letters and digits, in lower case), but those of every script, not only of English."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def rouge(texts: Sequence[str], right: Sequence[str]) -> Figures:
    """``rouge1``, ``rouge2`` and ``rougeL``: mean F1 (Lin 2004, https://aclanthology.org/W04-1013), without stemming.

    Raises:
        DataError: there are no texts.
        MissingLibraryError: rouge-score is not installed.
    """
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(kinds, tokenizer=_Words())
    if not len(right):
        raise nothing_to_measure(right)
    scores = [scorer.score(target, text) for text, target in zip(texts, right, strict=True)]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}


# ---- what they share --------------------------------------------------------------------------------------------


def nothing_to_measure(labels: Any) -> DataError:
    return DataError(f"there is nothing to measure: no label among {len(labels)} rows", "give rows with labels")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise MissingLibraryError(f"{package} is not installed", "pip install 'lorakeet[metrics]'") from None
