"""The held-out part: chosen by what a text says, so that no text is learned and measured at once."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from lorakeet.errors import DataError


@dataclass(frozen=True)
class Split:
    """Row numbers of the two parts, each in the order of the data, and how many different texts there are."""

    train: list[int]
    held_out: list[int]
    distinct: int


def normalised(text: str) -> str:
    """``text`` as far as duplicates go: without regard to white space, case and ways to encode a letter (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_texts(texts: Iterable[str], fraction: float, seed: int) -> Split:
    """Hold out ``fraction`` of the distinct texts, at least one of them, and with each all of its duplicates.

    Every text gets a number from a hash of ``seed`` and its normalised content; the lowest are held out. Neither the
    order of the rows nor how often a text is repeated has any influence.

    Raises:
        DataError: a part is to be held out of fewer than two distinct texts.
    """
    rows: dict[bytes, list[int]] = {}  # by content; the texts themselves need not stay in memory
    for number, text in enumerate(texts):
        rows.setdefault(hashlib.sha256(normalised(text).encode()).digest(), []).append(number)
    count = max(1, round(fraction * len(rows))) if fraction > 0 else 0
    if count and len(rows) < 2:
        raise DataError(
            f"{len(rows)} distinct text: too few to learn from one part and measure on another",
            "give more texts, or measure nothing: data.eval_fraction=0",
        )
    lottery = sorted(rows, key=lambda content: hashlib.sha256(b"%d:" % seed + content).digest())
    held_out = lottery[: min(count, len(rows) - 1)]
    return Split(
        train=sorted(number for content in lottery[len(held_out) :] for number in rows[content]),
        held_out=sorted(number for content in held_out for number in rows[content]),
        distinct=len(rows),
    )
