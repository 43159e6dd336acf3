"""Samples of rows, cached on disk for the next run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import tokenizers

from lorakeet.data.encode.encoder import Encoder, cannot_encode
from lorakeet.data.read.record import Fault
from lorakeet.data.rows.load import Rows
from lorakeet.files import cache_home, write_file
from lorakeet.log import info, warn
from lorakeet.security.paths import exists

#: Number of the format of cached samples; raise it when the same rows and tokenizer give other columns than before.
_FORMAT = 4


def tokenize(rows: Rows, content: str, encoder: Encoder) -> datasets.Dataset:
    """Encode ``rows``, or read their samples from the cache; :mod:`lorakeet.data.encode.encoder` lists the columns.

    The cache is below :func:`lorakeet.files.cache_home`. Its key is ``content``, the tokenizer and the encoder's settings.

    Args:
        rows: canonical columns and locations.
        content: hash of the rows.
        encoder: makes the samples.

    Returns:
        The samples in the order of their rows.

    Raises:
        DataError: rows that cannot be samples.
    """
    key = _cache_key(content, encoder)
    if key is None:
        return _encode(rows, encoder)
    path = cache_home() / "datasets" / "tokens" / f"{key}.arrow"
    if tokens := _read_cached(path, len(rows)):
        info(f"data: tokens read again from {path}")
        return tokens
    try:
        with write_file(path) as aside:
            _encode(rows, encoder, key, aside)
        return datasets.Dataset.from_file(str(path))
    except OSError as error:  # a full disk, a cache that belongs to somebody else
        warn(f"the tokens are not kept for the next run: {str(error).partition(chr(10))[0]}")
        return _encode(rows, encoder, key)


def _read_cached(path: Path, count: int) -> datasets.Dataset | None:
    """Read the samples of an earlier run; None if there are none, or not of all rows."""
    try:
        tokens = datasets.Dataset.from_file(str(path)) if exists(path) else None
    except (pyarrow.ArrowException, OSError):
        return None
    return tokens if tokens is not None and len(tokens) and tokens[-1]["row"] == count - 1 else None


def _encode(rows: Rows, encoder: Encoder, key: str | None = None, path: Path | None = None) -> datasets.Dataset:
    """Encode ``rows``, into the file ``path`` where one is given; raises an error that lists the faults."""
    faults: list[tuple[int, Fault]] = []

    def encode(batch: Mapping[str, list[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        encoded = encoder(batch, numbers)
        faults.extend(encoded.faults)
        return encoded.columns

    tokens = rows.data.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=rows.data.column_names,
        features=encoder.features(),
        cache_file_name=str(path) if path else None,
        load_from_cache_file=False,
        new_fingerprint=key,  # without it, datasets would pickle the tokenizer to compute one
        desc="tokenizing",
    )
    if faults:
        raise cannot_encode([(rows.locations[row], fault) for row, fault in faults], rows.description)
    return tokens


def _cache_key(content: str, encoder: Encoder) -> str | None:
    """Return a hash of everything that shapes the samples; None for a slow tokenizer, which cannot be serialized."""
    tokenizer: Any = encoder.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        return None
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation", None)  # left over from the last call: both are set anew for each
    rules.pop("padding", None)
    parts = [
        _FORMAT,
        tokenizers.__version__,
        type(tokenizer).__name__,
        rules,
        tokenizer.eos_token_id,
        encoder.settings(),
        content,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
