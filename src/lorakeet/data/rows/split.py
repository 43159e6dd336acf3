"""Held-out part, chosen by content, so that no text is trained on and measured at once."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorakeet.errors import DataError


@dataclass(frozen=True)
class Split:
    """Row numbers of the two parts, each in the order of the data, and the number of distinct texts."""

    train: list[int]
    held_out: list[int]
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
    return split_digests(
        (hashlib.sha256(normalized(text).encode()).digest() for text in texts), fraction, seed, classes
    )


def split_digests(
    digests: Iterable[bytes], fraction: float, seed: int, classes: Sequence[Iterable[str]] | None = None
) -> Split:
    """Split as :func:`split_texts` does, by the SHA-256 of each normalized text.

    Args:
        digests: of the texts, in the order of the rows.
        fraction: share of the distinct texts to hold out.
        seed: chooses them.
        classes: names of the classes of each row.

    Raises:
        DataError: a part is to be held out of fewer than two distinct texts.
    """
    rows: dict[bytes, list[int]] = {}
    for number, digest in enumerate(digests):
        rows.setdefault(digest, []).append(number)
    count = max(1, round(fraction * len(rows))) if fraction > 0 else 0
    if count and len(rows) < 2:
        raise DataError(
            f"{len(rows)} distinct text: too few to learn from one part and measure on another",
            "give more texts, or measure nothing: data.eval_fraction=0",
        )
    lottery = sorted(rows, key=lambda content: hashlib.sha256(b"%d:" % seed + content).digest())
    held_out = lottery[: min(count, len(rows) - 1)]
    if classes is not None:
        names = {content: {name for number in rows[content] for name in classes[number]} for content in lottery}
        held_out = _give_back(held_out, lottery[len(held_out) :], names)
    kept = set(held_out)
    return Split(
        train=sorted(number for content in lottery if content not in kept for number in rows[content]),
        held_out=sorted(number for content in held_out for number in rows[content]),
        distinct=len(rows),
    )


def _give_back(held_out: list[bytes], train: list[bytes], names: dict[bytes, set[str]]) -> list[bytes]:
    """Return ``held_out`` without the texts that ``train`` needs to have each class."""
    known = {name for content in train for name in names[content]}
    kept: list[bytes] = []
    for at in range(len(held_out) - 1, -1, -1):
        content = held_out[at]
        if names[content] <= known or not (kept or at):
            kept.append(content)
        else:
            known |= names[content]
    return kept[::-1]
