"""From settings to samples: read, check, split, tokenise, and say what will be learned before anything is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor.examine import check_rows
from lorakeet.data.encode.cache import tokenize
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.encode.make import complaint, make_encoder
from lorakeet.data.prepare_report import PrepareReport
from lorakeet.data.prepared import (
    Prepared,
    check_length,
    digest,
    figures,
    finished,
    id_columns,
    nothing_learnable,
    shape,
    tell,
)
from lorakeet.data.rows.content import contents, rows_hash, usable
from lorakeet.data.rows.kinds import find_kind
from lorakeet.data.rows.label_set import LabelSet, find_labels
from lorakeet.data.rows.load import Rows, read_rows
from lorakeet.data.rows.split import Split, split_texts
from lorakeet.errors import DataError

_REPORTED = (
    "null",
    "empty",
    "duplicate",
    "near_duplicate",
    "lost_character",
    "imbalance",
)  # problems that the report counts; what stops a run is none of them


def prepare(
    settings: DataSettings, task: TaskSettings, tokenizer: Any, *, seed: int, max_positions: int | None = None
) -> Prepared:
    """Read ``settings.path`` and make samples of it with ``tokenizer`` (of ``transformers``).

    Args:
        settings: the data.
        task: what is learned from it; its type is concrete.
        tokenizer: its end token is put after every text that is not cut.
        seed: chooses the held-out rows.
        max_positions: the longest sample that the model takes, if it has a limit.

    Raises:
        DataError: no such data, broken data, no columns for the task, unknown labels, rows that cannot be samples, nothing
            to learn, or samples too long for the model.
        BaseModelError: the tokenizer cannot do what the task needs, such as render a conversation.
    """
    if settings.stream:
        from lorakeet.data.prepare_stream import prepare_stream

        return prepare_stream(settings, task, tokenizer, seed=seed, max_positions=max_positions)
    read = read_rows(settings, task.type, seed=seed)
    kind, source = read.layout.kind, read.description
    filled = usable(read.data, kind)
    if not filled:
        raise DataError(f"nothing to learn in {source}: all {len(read.data):,} rows are empty", "check data.columns")
    used = read.select(filled)
    rows, label_column = used.data, find_kind(kind).labels
    labels = find_labels(rows[label_column][:], used.locations, task, source) if label_column else None
    found = check_rows(used, task, settings=settings).findings
    tell(finding for finding in found if finding.kind not in _REPORTED)
    encoder = make_encoder(read.layout, task, settings, tokenizer, labels)
    content_hash = rows_hash(rows)
    tokens = tokenize(rows, content_hash, encoder)
    tokens = tokens.select(_learnable(tokens, used, source, encoder, task))
    check_length(max(tokens["length"][:]), max_positions)
    row_of = tokens["row"][:]  # for each sample its number in rows
    numbers = sorted(set(row_of))
    some = rows.select(numbers)
    texts = contents(some, kind)
    parts = split_texts(texts, settings.eval_fraction, seed, _classes(some, labels, label_column))
    parts, moved = _apart(tokens, _sides(parts, numbers, row_of), settings, source)
    train, held_out = tokens.select(parts.train), tokens.select(parts.held_out)
    train_rows, held_out_rows = (
        rows.select(sorted({row_of[sample] for sample in part})) for part in (parts.train, parts.held_out)
    )
    report = PrepareReport(
        source=source,
        kind=kind,
        task=task.type,
        rows=len(read.data),
        empty=len(read.data) - len(filled),
        unlearnable=len(rows) - len(numbers),
        distinct=parts.distinct,
        duplicates=len(numbers) - parts.distinct,
        moved=moved,
        **figures("train", train),
        **figures("held_out", held_out),
        **shape(tokens),
        max_length=settings.max_length,
        end_token=tokenizer.eos_token,
        damaged=sum("\ufffd" in text for text in texts),
        labels=labels.count(train_rows[label_column][:]) if labels and labels.names else None,
        streamed=False,
        content_hash=content_hash,
    )
    some_held_out = bool(parts.held_out)
    return finished(
        report,
        encoder,
        labels,
        read.layout,
        (train, held_out if some_held_out else None),
        (train_rows, held_out_rows if some_held_out else None),
    )


def _learnable(tokens: datasets.Dataset, rows: Rows, source: str, encoder: Encoder, task: TaskSettings) -> list[int]:
    """Numbers of the samples that have a target; all rows that cannot be samples are complained of."""
    if any(tokens["fault"][:]):
        pairs = zip(tokens["row"][:], tokens["fault"][:], strict=True)
        raise complaint(((rows.locations[row], fault) for row, fault in pairs if fault), source)
    kept = [number for number, targets in enumerate(tokens["targets"][:]) if targets]
    if not kept:
        raise nothing_learnable(tokens[0], source, encoder, task)
    return kept


def _classes(rows: datasets.Dataset, labels: LabelSet | None, column: str | None) -> list[list[str]] | None:
    if labels is None or not labels.names:
        return None
    return [labels.classes(label) for label in rows[column][:]]


def _sides(split: Split, numbers: Sequence[int], row_of: Sequence[int]) -> Split:
    """A split of the rows with these ``numbers`` as one of samples."""
    held_out = {numbers[place] for place in split.held_out}
    sides: tuple[list[int], list[int]] = [], []
    for sample, row in enumerate(row_of):
        sides[row in held_out].append(sample)
    return Split(*sides, split.distinct)


def _apart(tokens: datasets.Dataset, split: Split, settings: DataSettings, source: str) -> tuple[Split, int]:
    """The split with each held-out sample that equals a training sample moved to it (two long texts that begin alike
    and were cut), and how many were moved.

    Raises:
        DataError: no held-out sample is left.
    """
    cut = [number for number, is_cut in enumerate(tokens["cut"][:]) if is_cut]
    some = tokens.select(cut).select_columns(id_columns(tokens.features))
    digests = {number: digest(sample) for number, sample in zip(cut, some, strict=True)}
    held_out = digests.keys() & set(split.held_out)
    learned = {digests[number] for number in digests.keys() - held_out}
    moved = {number for number in held_out if digests[number] in learned}
    kept = [number for number in split.held_out if number not in moved]
    if moved and not kept:
        raise DataError(
            f"cut to {settings.max_length} tokens, each held-out sample of {source} equals a training sample",
            "raise data.max_length, or split the texts",
        )
    return Split(sorted([*split.train, *moved]), kept, split.distinct), len(moved)
