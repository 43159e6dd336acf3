"""Content of canonical rows: which can be used, the text that decides the split, a hash of them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets

from lorakeet.data.rows.kinds import find_kind


def usable(rows: datasets.Dataset, kind: str) -> list[int]:
    """Return the numbers of the rows that a sample can be made of."""
    is_usable = find_kind(kind).is_usable
    return [number for number, row in enumerate(_rows(rows.iter(1000))) if is_usable(row)]


def content(row: Mapping[str, Any], kind: str) -> str:
    """Return the text that decides between training and held-out part; equal texts never straddle the split."""
    values = (row.get(name) for name in find_kind(kind).content_columns())
    return "\n".join(" ".join(value) if isinstance(value, list) else value or "" for value in values)


class ContentHash:
    """SHA-256 of rows in their order, labels included; of the texts themselves, where there is nothing else.

    Args:
        columns: of the rows.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._only_text = list(columns) == ["text"]
        self._digest = hashlib.sha256()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        text = row["text"] if self._only_text else json.dumps(row, sort_keys=True, ensure_ascii=False)
        data = text.encode()
        self._digest.update(b"%d:" % len(data) + data)

    def hexdigest(self) -> str:
        """Return the hash of the rows so far, in hexadecimal."""
        return self._digest.hexdigest()


def content_hash(texts: Iterable[str]) -> str:
    """Return the :class:`ContentHash` of rows of text alone."""
    digest = ContentHash(["text"])
    for text in texts:
        digest.add({"text": text})
    return digest.hexdigest()


def _rows(batches: Iterable[Mapping[str, list[Any]]]) -> Iterable[dict[str, Any]]:
    for batch in batches:
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))
