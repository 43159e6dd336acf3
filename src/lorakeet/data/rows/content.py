"""What a canonical row is about: whether it can be used, the text by which it is split, the hash of all rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import datasets

from lorakeet.data.rows.column_mapping import Kind

#: The columns that say what a row is about: two rows that are equal in them are never learned and measured at once.
CONTENT: Mapping[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "classes": ("text", "text_pair"),
    "tags": ("tokens",),
    "pairs": ("anchor", "positive"),
    "translation": ("source",),
    "question": ("question", "context"),
}
#: Columns of each kind that must hold something; ``None`` is nothing, and so is a text of white space.
_NEEDED: Mapping[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("completion",),
    "messages": ("messages",),
    "classes": ("text",),
    "tags": ("tokens",),
    "pairs": ("anchor", "positive", "negative"),
    "translation": ("source", "target"),
    "question": ("question", "context"),
}
#: Columns that may be empty, but must be there.
_THERE: Mapping[Kind, tuple[str, ...]] = {
    "completion": ("prompt",),
    "classes": ("label", "text_pair"),
    "tags": ("tags",),
    "question": ("answers", "answer_start"),
}


def is_usable(row: Mapping[str, Any], kind: Kind) -> bool:
    """Whether a canonical row has all that its kind needs."""
    for name in _NEEDED[kind]:
        value = row.get(name, "there")
        if value is None or not len(value) or (isinstance(value, str) and value.isspace()):
            return False
    for name in _THERE.get(kind, ()):
        value = row.get(name, "there")
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return False
    return True


def usable(rows: datasets.Dataset, kind: Kind) -> list[int]:
    """Numbers of the rows that have all that their kind needs."""
    wanted = [name for name in (*_NEEDED[kind], *_THERE.get(kind, ())) if name in rows.column_names]
    batches = rows.select_columns(wanted).iter(1000)
    return [number for number, row in enumerate(_rows(batches)) if is_usable(row, kind)]


def content(row: Mapping[str, Any], kind: Kind) -> str:
    """The text by which a row is split: rows that are equal in it are on the same side."""
    values = (row.get(name) for name in CONTENT[kind])
    return "\n".join(" ".join(value) if isinstance(value, list) else value or "" for value in values)


def contents(rows: datasets.Dataset, kind: Kind) -> list[str]:
    """:func:`content` of each row."""
    if CONTENT[kind] == ("text",):
        return list(rows["text"][:])
    wanted = [name for name in CONTENT[kind] if name in rows.column_names]
    return [content(row, kind) for row in _rows(rows.select_columns(wanted).iter(1000))]


def rows_hash(rows: datasets.Dataset, kind: Kind) -> str:
    """:func:`content_hash` of the rows, labels included: of the texts themselves, where there is nothing else."""
    if kind == "text":
        return content_hash(rows["text"][:])
    names = [name for name in rows.column_names if name != "place"]
    batches = rows.select_columns(names).iter(1000)
    return content_hash(json.dumps(row, sort_keys=True, ensure_ascii=False) for row in _rows(batches))


def content_hash(texts: Iterable[str]) -> str:
    """SHA-256 over ``texts`` in their order, each with its length, in hexadecimal."""
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
