"""Content of canonical rows: which can be used, the text that decides the split, a hash of them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
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


def contents(rows: datasets.Dataset, kind: str) -> list[str]:
    """Return the :func:`content` of each row."""
    columns = find_kind(kind).content_columns()
    if columns == ["text"]:
        return list(rows["text"][:])
    wanted = [name for name in columns if name in rows.column_names]
    return [content(row, kind) for row in _rows(rows.select_columns(wanted).iter(1000))]


def rows_hash(rows: datasets.Dataset) -> str:
    """Return a hash of the rows, labels included; of the texts themselves, where there is nothing else."""
    if rows.column_names == ["text"]:
        return content_hash(rows["text"][:])
    batches = rows.iter(1000)
    return content_hash(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in _rows(batches))


def content_hash(texts: Iterable[str]) -> str:
    """Return SHA-256 over ``texts`` in their order, each with its length, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


def _rows(batches: Iterable[Mapping[str, list[Any]]]) -> Iterable[dict[str, Any]]:
    for batch in batches:
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))
