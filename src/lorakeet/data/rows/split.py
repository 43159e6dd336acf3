"""Held-out part, chosen by content, so that no text is trained on and measured at once."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lorakeet.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Row numbers of the two parts, each int64 in the order of the data, and the number of distinct texts."""

    train: np.ndarray
    held_out: np.ndarray
    distinct: int


def normalized(text: str) -> str:
    """Return ``text`` without differences of white space, case and ways to encode a letter (NFKC)."""
    if not text.isascii():  # of ASCII, NFKC is the text itself
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def split_texts(
    texts: Iterable[str], fraction: float, seed: int, classes: Sequence[Iterable[str]] | None = None
) -> Split:
    """Hold out ``fraction`` of the distinct texts, at least one of them, and with each all of its duplicates.

    Every text gets a number from a hash of ``seed`` and its normalised content; the lowest are held out. Neither the
    order of the rows nor how often a text is repeated has any influence.

    Args:
        texts: what the rows are about.
        fraction: share of the distinct texts.
        seed: chooses them.
        classes: names of the classes of each row. A class that would only be held out gets back its text with the highest
            number, as long as another text remains held out.

    Raises:
        DataError: a part is to be held out of fewer than two distinct texts.
    """
    digests = b"".join(hashlib.sha256(normalized(text).encode()).digest() for text in texts)
    return split_digests(_as_digests(digests), fraction, seed, classes)


def _as_digests(joined: bytes) -> np.ndarray:
    """Return SHA-256 digests that stand one after the other as an array, uint8 [digests, 32]."""
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 32)


def split_digests(
    digests: np.ndarray, fraction: float, seed: int, classes: Sequence[Iterable[str]] | None = None
) -> Split:
    """Split as :func:`split_texts` does, by the SHA-256 of each normalized text.

    Args:
        digests: of the texts, in the order of the rows, uint8 [rows, 32].
        fraction: share of the distinct texts to hold out.
        seed: chooses them.
        classes: names of the classes of each row.

    Raises:
        DataError: a part is to be held out of fewer than two distinct texts.
    """
    distinct, text_of = _distinct(digests)
    count = max(1, round(fraction * len(distinct))) if fraction > 0 else 0
    if count and len(distinct) < 2:
        raise DataError(
            f"{len(distinct)} distinct text: too few to learn from one part and measure on another",
            "give more texts, or measure nothing: data.eval_fraction=0",
        )
    is_held_out = np.zeros(len(distinct), dtype=bool)
    if count:
        lottery = _lottery(distinct, seed)
        held_out, train = np.split(lottery, [min(count, len(distinct) - 1)])
        if classes is not None:
            held_out = _give_back(held_out, train, _names_by_text(text_of, len(distinct), classes))
        is_held_out[held_out] = True
    side = is_held_out[text_of]
    return Split(train=np.flatnonzero(~side), held_out=np.flatnonzero(side), distinct=len(distinct))


def _order(digests: np.ndarray) -> np.ndarray:
    """Return the numbers of ``digests`` in ascending order, as bytes are compared."""
    words = digests.view(">u8").astype(np.uint64)
    return np.lexsort(words.T[::-1])


def _distinct(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ``digests``, and for each row the number of its own among them [rows]."""
    order = _order(digests)
    ordered = digests[order]
    is_first = np.ones(len(digests), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    text_of = np.empty(len(digests), dtype=np.int64)
    text_of[order] = np.cumsum(is_first) - 1
    return ordered[is_first], text_of


def _lottery(distinct: np.ndarray, seed: int) -> np.ndarray:
    """Return the numbers of the texts in the order in which they are held out [texts]."""
    joined, prefix = distinct.tobytes(), b"%d:" % seed
    drawn = b"".join(hashlib.sha256(prefix + joined[at : at + 32]).digest() for at in range(0, len(joined), 32))
    return _order(_as_digests(drawn))


def _names_by_text(text_of: np.ndarray, count: int, classes: Sequence[Iterable[str]]) -> list[set[str]]:
    """Return the names of the classes of each of ``count`` texts."""
    names: list[set[str]] = [set() for _ in range(count)]
    for text, of_row in zip(text_of.tolist(), classes, strict=True):
        names[text].update(of_row)
    return names


def _give_back(held_out: np.ndarray, train: np.ndarray, names: Sequence[set[str]]) -> np.ndarray:
    """Return ``held_out`` without the texts that ``train`` needs to have each class."""
    known = {name for text in train.tolist() for name in names[text]}
    kept: list[int] = []
    for at, text in reversed(list(enumerate(held_out.tolist()))):
        if names[text] <= known or not (kept or at):
            kept.append(text)
        else:
            known |= names[text]
    return np.array(kept, dtype=np.int64)
