"""Rows to samples of token ids, kept for the next run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import tokenizers

from lorakeet.data.encode.encoder import Encoder
from lorakeet.files import cache_home, write_file
from lorakeet.log import info, warn

_FORMAT = 2  # raise it when the same rows and tokenizer give other columns than before


def tokenize(rows: datasets.Dataset, content: str, encoder: Encoder) -> datasets.Dataset:
    """The samples that ``encoder`` makes of ``rows``, in their order (:mod:`lorakeet.data.encode.encoder` says which columns).

    The result is kept below :func:`lorakeet.files.cache_home`, and used again for the same ``content`` (a hash of the
    rows), tokenizer and settings of the encoder.
    """
    name = _cache_name(content, encoder)
    if name is None:
        return _encode(rows, encoder)
    kept = cache_home() / "datasets" / "tokens" / f"{name}.arrow"
    if tokens := _read_again(kept, len(rows)):
        info(f"data: tokens read again from {kept}")
        return tokens
    try:
        with write_file(kept) as aside:
            _encode(rows, encoder, name, aside)
        return datasets.Dataset.from_file(str(kept))
    except OSError as error:  # a full disk, a cache that belongs to somebody else
        warn(f"the tokens are not kept for the next run: {str(error).partition(chr(10))[0]}")
        return _encode(rows, encoder, name)


def _read_again(kept: Path, count: int) -> datasets.Dataset | None:
    """The tokens kept in an earlier run, if they are there and whole."""
    try:
        tokens = datasets.Dataset.from_file(str(kept)) if kept.exists() else None
    except (pyarrow.ArrowException, OSError):
        return None
    return tokens if tokens is not None and len(tokens) and tokens[-1]["row"] == count - 1 else None


def _encode(
    rows: datasets.Dataset, encoder: Encoder, name: str | None = None, path: Path | None = None
) -> datasets.Dataset:
    return rows.map(
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=encoder.features(),
        cache_file_name=str(path) if path else None,
        load_from_cache_file=False,
        new_fingerprint=name,  # left out, datasets would pickle the tokenizer to make one
        desc="tokenising",
    )


def _cache_name(content: str, encoder: Encoder) -> str | None:
    """What the tokens depend on, as a name; None for a tokenizer that cannot be written down (one in pure Python)."""
    tokenizer: Any = encoder.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        return None
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation", None)  # whatever the last caller wanted: both are set anew for each call
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
