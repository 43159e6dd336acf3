"""Preparation of data for a run, in five steps: read, examine, encode, split, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor.examiner import ExaminedRows, examine_rows
from lorakeet.data.doctor.issues import COUNTED
from lorakeet.data.encode.cache import tokenize
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.encode.kinds import make_encoder
from lorakeet.data.prepare_report import PrepareReport
from lorakeet.data.prepare_stream import prepare_stream
from lorakeet.data.prepared import (
    Prepared,
    check_length,
    count_columns,
    digest,
    figures,
    finish,
    id_columns,
    log_issues,
    nothing_learnable,
    shape,
)
from lorakeet.data.rows.kinds import find_kind
from lorakeet.data.rows.label_set import LabelSet, find_labels
from lorakeet.data.rows.load import Rows, read_rows, select
from lorakeet.data.rows.split import split_digests
from lorakeet.errors import DataError

#: Hint for data without a usable row.
_EMPTY_HINT = "check that data.columns names the right columns; `lorakeet doctor` counts what is missing"


def prepare(
    settings: DataSettings,
    task: TaskSettings,
    tokenizer: Any,
    *,
    seed: int,
    max_positions: int | None = None,
    vocabulary: int | None = None,
) -> Prepared:
    """Read ``settings.path`` and make samples of it.

    Args:
        settings: of the data.
        task: to be trained; its type is concrete.
        tokenizer: of ``transformers``; its end token is put after every text that is not cut.
        seed: chooses the held-out rows.
        max_positions: tokens of the longest sample that the model takes; None: no limit.
        vocabulary: rows of the model's embedding; None: enough for every token.

    Raises:
        DataError: data that is missing, broken, without columns for the task or samples, or that the model cannot read.
        BaseModelError: the tokenizer cannot do what the task needs, such as render a conversation.
    """
    if settings.stream:
        limits = {"max_positions": max_positions, "vocabulary": vocabulary}
        return prepare_stream(settings, task, tokenizer, seed=seed, **limits)
    rows = read_rows(settings, task.type, seed=seed)
    examined = _examine(rows, task, settings, tokenizer)
    encoder = make_encoder(examined.rows.layout, task, settings, tokenizer, examined.labels, vocabulary)
    samples = _encode(examined, encoder, task, max_positions)
    sides = _split(samples, examined, settings, seed)
    return _report(rows, examined, samples, sides, settings, task)


@dataclass(frozen=True)
class _Examined:
    """Usable rows, their labels, and the examination of all rows."""

    rows: Rows
    labels: LabelSet | None
    found: ExaminedRows

    @property
    def label_column(self) -> str | None:
        return find_kind(self.rows.layout.kind).labels

    def labels_of(self, numbers: np.ndarray) -> list[Any]:
        """Return the labels of the rows with these ``numbers``."""
        return list(select(self.rows.data, numbers)[self.label_column][:])


@dataclass(frozen=True)
class _Samples:
    """Samples of all usable rows.

    Attributes:
        encoder: made them.
        tokens: all samples.
        counts: columns of counts of all samples, each [samples].
        numbers: of the samples that have a target, int64 [samples with a target].
    """

    encoder: Encoder
    tokens: datasets.Dataset
    counts: dict[str, np.ndarray]
    numbers: np.ndarray


@dataclass(frozen=True)
class _Sides:
    """Numbers of the samples of both sides, and of their rows; each int64, in the order of the data."""

    train: np.ndarray
    held_out: np.ndarray
    train_rows: np.ndarray
    held_out_rows: np.ndarray
    distinct: int
    moved: int


def _examine(rows: Rows, task: TaskSettings, settings: DataSettings, tokenizer: Any) -> _Examined:
    """Examine all rows: keep the usable ones, gather their labels, and log the issues or refuse the data."""
    found = examine_rows(rows, task, settings, tokenizer)
    if not found.usable:
        raise DataError(f"nothing to learn in {rows.description}: all {len(rows):,} rows are empty", _EMPTY_HINT)
    usable = rows if len(found.usable) == len(rows) else rows.select(found.usable)
    column = find_kind(rows.layout.kind).labels
    labels = None
    if column is not None:
        labels = find_labels(usable.data[column][:], usable.locations, task, rows.description)
    log_issues(group for group in found.issues if group.code not in COUNTED)
    return _Examined(usable, labels, found)


def _encode(examined: _Examined, encoder: Encoder, task: TaskSettings, max_positions: int | None) -> _Samples:
    """Tokenize the usable rows, or read their samples from the cache."""
    rows = examined.rows
    tokens = tokenize(rows, examined.found.content_hash, encoder)
    counts = count_columns(tokens)
    numbers = np.flatnonzero(counts["targets"])
    if not len(numbers):
        raise nothing_learnable(tokens[0], rows.description, encoder, task)
    check_length(int(counts["length"][numbers].max()), max_positions)
    return _Samples(encoder, tokens, counts, numbers)


def _split(samples: _Samples, examined: _Examined, settings: DataSettings, seed: int) -> _Sides:
    """Choose the held-out rows by their content, and put each sample on the side of its row."""
    row_of = samples.counts["row"][samples.numbers]
    rows = np.unique(row_of)
    classes = None
    if examined.labels is not None and examined.labels.names:
        classes = [examined.labels.classes(label) for label in examined.labels_of(rows)]
    split = split_digests(examined.found.digests[rows], settings.eval_fraction, seed, classes)
    is_held_out = np.zeros(len(examined.rows), dtype=bool)
    is_held_out[rows[split.held_out]] = True
    side = is_held_out[row_of]
    train, held_out = samples.numbers[~side], samples.numbers[side]
    moved = _equal_when_cut(samples, train, held_out)
    if len(moved) and len(moved) == len(held_out):
        raise DataError(
            f"cut to {settings.max_length} tokens, each held-out sample of {examined.rows.description} equals a "
            "training sample",
            "raise data.max_length, or split the texts",
        )
    if len(moved):
        train, held_out = np.union1d(train, moved), np.setdiff1d(held_out, moved)
    train_rows, held_out_rows = (np.unique(samples.counts["row"][part]) for part in (train, held_out))
    return _Sides(train, held_out, train_rows, held_out_rows, split.distinct, len(moved))


def _equal_when_cut(samples: _Samples, train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return the held-out samples that equal a training sample: two long texts that begin alike, and were cut."""
    cut = samples.counts["cut"].astype(bool)
    some = held_out[cut[held_out]]
    if not len(some):
        return some
    columns = samples.tokens.select_columns(id_columns(samples.tokens.features))
    trained = {digest(columns[int(number)]) for number in train[cut[train]]}
    return np.array([number for number in some if digest(columns[int(number)]) in trained], dtype=np.int64)


def _report(
    read: Rows, examined: _Examined, samples: _Samples, sides: _Sides, settings: DataSettings, task: TaskSettings
) -> Prepared:
    """Build the report and log its warnings; returns it with the samples of both sides."""
    rows, issues, labels = examined.rows, examined.found.issues, examined.labels
    tokens = select(samples.tokens, sides.train), select(samples.tokens, sides.held_out)
    canonical = select(rows.data, sides.train_rows), select(rows.data, sides.held_out_rows)
    if not len(sides.held_out):
        tokens, canonical = (tokens[0], None), (canonical[0], None)
    learnable = len(np.union1d(sides.train_rows, sides.held_out_rows))
    report = PrepareReport(
        source=rows.description,
        kind=rows.layout.kind,
        task=task.type,
        rows=len(read),
        empty=len(read) - len(rows),
        unlearnable=len(rows) - learnable,
        distinct=sides.distinct,
        duplicates=issues.count("duplicate") + issues.count("near_duplicate"),
        moved=sides.moved,
        **figures("train", samples.counts, sides.train),
        **figures("held_out", samples.counts, sides.held_out),
        **shape(samples.counts, samples.numbers),
        max_length=settings.max_length,
        end_token=samples.encoder.tokenizer.eos_token,
        damaged=issues.count("lost_character"),
        labels=labels.count(examined.labels_of(sides.train_rows)) if labels and labels.names else None,
        streamed=False,
        content_hash=examined.found.content_hash,
    )
    locations = rows.locations.select(samples.counts["row"][sides.train])
    return finish(report, samples.encoder, labels, rows.layout, tokens, canonical, rows.data, locations)
