"""Texts to token ids, in batches, with the end token, and kept for the next run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import tokenizers

from lorakeet.files import cache_home, write_file
from lorakeet.talk import say, warn

_FORMAT = 1  # raise it when the same text and tokenizer give other columns than before

_FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "cut": datasets.Value("bool"),
        "ended": datasets.Value("bool"),
    }
)


def tokenise(rows: datasets.Dataset, content: str, tokenizer: Any, max_length: int) -> datasets.Dataset:
    """Token ids of each ``text``: columns ``input_ids``, ``length``, ``cut`` and ``ended``.

    A text is encoded with the special tokens of its tokenizer, and the end token after it. Where that is longer than
    ``max_length`` it is cut, and has no end token: the text did not end there. The result is kept below
    :func:`lorakeet.files.cache_home`, and used again for the same ``content`` (a hash of the texts), tokenizer and
    ``max_length``.
    """
    name = _cache_name(content, tokenizer, max_length)
    if name is None:
        return _encode(rows, tokenizer, max_length)
    kept = cache_home() / "datasets" / "tokens" / f"{name}.arrow"
    if tokens := _read_again(kept, len(rows)):
        say(f"data: tokens read again from {kept}")
        return tokens
    try:
        with write_file(kept) as aside:
            _encode(rows, tokenizer, max_length, name, aside)
        return datasets.Dataset.from_file(str(kept))
    except OSError as error:  # a full disk, a cache that belongs to somebody else
        warn(f"the tokens are not kept for the next run: {str(error).partition(chr(10))[0]}")
        return _encode(rows, tokenizer, max_length, name)


def _read_again(kept: Path, count: int) -> datasets.Dataset | None:
    """The tokens kept in an earlier run, if they are there and whole."""
    try:
        tokens = datasets.Dataset.from_file(str(kept)) if kept.exists() else None
    except (pyarrow.ArrowException, OSError):
        return None
    return tokens if tokens is not None and len(tokens) == count else None


def _encode(
    rows: datasets.Dataset, tokenizer: Any, max_length: int, name: str | None = None, path: Path | None = None
) -> datasets.Dataset:
    end = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        samples = tokenizer(batch["text"], padding=False, truncation=False, verbose=False)["input_ids"]
        if end is not None:  # some tokenizers have put it there already
            samples = [ids if ids[-1:] == [end] else [*ids, end] for ids in samples]
        return {
            "input_ids": [ids[:max_length] for ids in samples],
            "length": [min(len(ids), max_length) for ids in samples],
            "cut": [len(ids) > max_length for ids in samples],
            "ended": [len(ids) <= max_length and ids[-1:] == [end] for ids in samples],
        }

    return rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        features=_FEATURES,
        cache_file_name=str(path) if path else None,
        load_from_cache_file=False,
        new_fingerprint=name,  # left out, datasets would pickle the tokenizer to make one
        desc="tokenising",
    )


def _cache_name(content: str, tokenizer: Any, max_length: int) -> str | None:
    """What the tokens depend on, as a name; None for a tokenizer that cannot be written down (one in pure Python)."""
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
        max_length,
        content,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
