"""From settings to samples: read, check, split, tokenise, and say what will be learned before anything is learned."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import datasets

from lorakeet.config import DataSettings
from lorakeet.data.report import Report
from lorakeet.data.show import show_sample
from lorakeet.data.sources import read_rows
from lorakeet.data.split import Split, split_texts
from lorakeet.data.tokens import tokenise
from lorakeet.errors import DataError
from lorakeet.talk import warn


@dataclass(frozen=True)
class Prepared:
    """Samples with columns ``input_ids`` (list of int32) and ``length``, unpadded, in the order of the data.

    Every token but the first of a sample is a target. ``held_out`` is None where nothing is to be held out.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    report: Report


def prepare(settings: DataSettings, tokenizer: Any, *, seed: int, max_positions: int | None = None) -> Prepared:
    """Read ``settings.path`` and make samples of it with ``tokenizer`` (of ``transformers``).

    Args:
        settings: the data.
        tokenizer: its end token is put after every text that is not cut.
        seed: chooses the held-out texts.
        max_positions: the longest sample that the model takes, if it has a limit.

    Raises:
        DataError: no such data, broken data, no column of text, nothing to learn, or samples too long for the model.
    """
    rows = read_rows(settings)
    source = rows.info.description
    filled = [number for number, text in enumerate(rows["text"][:]) if text and not text.isspace()]
    if not filled:
        raise DataError(f"nothing to learn in {source}: all {len(rows):,} rows are empty")
    texts = rows.select(filled)
    content = content_hash(texts["text"][:])
    tokens = tokenise(texts, content, tokenizer, settings.max_length)
    texts, tokens = _learnable(texts, tokens, source, tokenizer)
    _check_length(max(tokens["length"][:]), max_positions)
    split = split_texts(texts["text"][:], settings.eval_fraction, seed)
    moved = _equal_when_cut(tokens, split)
    train = tokens.select(sorted({*split.train, *moved}))
    held_out = tokens.select([number for number in split.held_out if number not in moved])
    if split.held_out and not len(held_out):
        raise DataError(
            f"cut to {settings.max_length} tokens, each held-out sample of {source} equals a training sample",
            "raise data.max_length, or split the texts",
        )
    report = Report(
        source=source,
        rows=len(rows),
        empty=len(rows) - len(filled),
        short=len(filled) - len(texts),
        distinct=split.distinct,
        duplicates=len(texts) - split.distinct,
        moved=len(moved),
        **_figures("train", train),
        **_figures("held_out", held_out),
        **_shape(tokens),
        max_length=settings.max_length,
        end_token=tokenizer.eos_token,
        damaged=sum("\ufffd" in text for text in texts["text"][:]),
        content_hash=content,
    )
    for complaint in report.warnings():
        warn(complaint)
    return Prepared(_samples(train), _samples(held_out) if len(held_out) else None, report)


def content_hash(texts: Iterable[str]) -> str:
    """SHA-256 over ``texts`` in their order, each with its length, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


def _learnable(
    texts: datasets.Dataset, tokens: datasets.Dataset, source: str, tokenizer: Any
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows that have a target: the first token of a sample is none, since nothing stands before it."""
    kept = [number for number, length in enumerate(tokens["length"][:]) if length > 1]
    if not kept:
        sample = show_sample(tokenizer, tokens[0]["input_ids"])
        raise DataError(f"nothing to learn in {source}: no sample has a second token; the first one is\n{sample}")
    return texts.select(kept), tokens.select(kept)


def _check_length(longest: int, max_positions: int | None) -> None:
    if max_positions is not None and longest > max_positions:
        raise DataError(
            f"the longest sample has {longest:,} tokens, the model takes {max_positions:,}",
            f"cut longer ones: data.max_length={max_positions}",
        )


def _equal_when_cut(tokens: datasets.Dataset, split: Split) -> set[int]:
    """Held-out rows whose tokens equal those of a training row: two long texts that begin alike and were cut."""
    cut = [number for number, is_cut in enumerate(tokens["cut"][:]) if is_cut]
    ids = (sample for batch in tokens.select(cut).iter(1000) for sample in batch["input_ids"])
    digests = {number: hashlib.sha256(array("i", sample)).digest() for number, sample in zip(cut, ids, strict=True)}
    held_out = digests.keys() & set(split.held_out)
    learned = {digests[number] for number in digests.keys() - held_out}
    return {number for number in held_out if digests[number] in learned}


def _figures(part: str, tokens: datasets.Dataset) -> dict[str, Any]:
    total = sum(tokens["length"][:])
    return {f"{part}_samples": len(tokens), f"{part}_tokens": total, f"{part}_targets": total - len(tokens)}


def _shape(tokens: datasets.Dataset) -> dict[str, Any]:
    lengths = tokens["length"][:]
    counts = {name: sum(tokens[name][:]) for name in ("cut", "ended")}
    return {"median_length": float(median(lengths)), "longest": max(lengths), **counts}


def _samples(tokens: datasets.Dataset) -> datasets.Dataset:
    return tokens.select_columns(["input_ids", "length"])
