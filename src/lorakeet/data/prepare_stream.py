"""Samples of data that is read while it is learned: encoded row by row, in constant memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

import datasets

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor.examine import check_heads
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
from lorakeet.data.rows.content import usable
from lorakeet.data.rows.kinds import find_kind
from lorakeet.data.rows.label_set import given_labels
from lorakeet.data.rows.load import Rows
from lorakeet.data.rows.stream import LOCATION, held_out_rows, lay_out, stream_rows
from lorakeet.errors import DataError
from lorakeet.log import warn

_HEAD = 256  # samples that are looked at before anything is learned
_BATCH = 64  # rows that are tokenised together
_TOLD = 3  # rows that cannot be samples and are said; of further ones only how many there are
_CHECKED = 2000  # rows that are checked before anything is learned, of all sources together
# Rows that are left out are said when they are read, and that no row is left, when all are.
_SAID_LATER = ("broken", "encoding", "wrong_type", "half_character", "tag_count", "nothing")


def prepare_stream(
    settings: DataSettings, task: TaskSettings, tokenizer: Any, *, seed: int, max_positions: int | None = None
) -> Prepared:
    """As :func:`lorakeet.data.prepare.prepare`; the training part is an ``IterableDataset``, the held-out part in memory.

    The beginning is checked as by :mod:`lorakeet.data.doctor.examine`. Rows that cannot be read or cannot be samples are left
    out; the first of them are said, and how many there are at 10, 100, 1,000 and so on.

    Raises:
        DataError: as :func:`~lorakeet.data.prepare.prepare`, as far as the beginning of the data tells.
    """
    held = held_out_rows(settings, task.type, seed)
    layout, kind, source = held.layout, held.layout.kind, held.description
    label_column = find_kind(kind).labels
    labels = given_labels(layout.types[label_column], task) if label_column else None
    checked, sound = _check(settings, task)
    encoder = make_encoder(layout, task, settings, tokenizer, labels)
    rows = held.select(usable(held.data, kind))
    tokens = _held_out(rows, encoder, source)
    measured = {digest(sample) for sample in tokens.select_columns(id_columns(encoder.model_columns()))}
    train = _samples(stream_rows(settings, task.type, seed), encoder, kind, measured)
    head = list(islice(_samples(stream_rows(settings, task.type, seed), encoder, kind, measured), _HEAD))
    if not head:
        raise _nothing(settings, task, encoder, seed, source, kind)
    check_length(max(sample["length"] for sample in [*head, *tokens]), max_positions)
    report = PrepareReport(
        source=source,
        kind=kind,
        task=task.type,
        rows=0,
        empty=len(held.data) - len(rows),
        unlearnable=len(rows) - len(set(tokens["row"][:])),
        distinct=0,
        duplicates=0,
        moved=0,
        train_samples=0,
        train_tokens=0,
        train_targets=0,
        **figures("held_out", tokens),
        **shape(tokens),
        max_length=settings.max_length,
        end_token=tokenizer.eos_token,
        damaged=0,
        labels=None,
        streamed=True,
        checked=checked,
        sound=sound,
        content_hash=hashlib.sha256(json.dumps([source, settings.model_dump(), seed]).encode()).hexdigest(),
    )
    return finished(report, encoder, labels, layout, (train, tokens if len(tokens) else None))


def _check(settings: DataSettings, task: TaskSettings) -> tuple[int, int]:
    """Say what is wrong with the beginning of each source; returns the rows looked at, and how many of them can be used.

    Raises:
        DataError: something would spoil the run.
    """
    laid, _ = lay_out(settings, task.type)
    found = check_heads([(item.source, item.layout) for item in laid], task, settings=settings, most=_CHECKED)
    among = f" among the first {found.rows:,} rows"
    unsaid: tuple[str, ...] = _SAID_LATER
    if found.count("one_label") and found.rows >= _CHECKED // len(laid):  # else no source has more
        unsaid = (*unsaid, "one_label")
        warn(
            f"the first {found.rows:,} rows all have the label {next(iter(found.labels))!r}: a stream is shuffled within "
            f"{settings.shuffle_buffer:,} rows (data.shuffle_buffer), so mix files that are sorted by label before"
        )
    tell((finding for finding in found.findings if finding.kind not in unsaid), among)
    return found.rows, found.usable


def _held_out(rows: Rows, encoder: Encoder, source: str) -> datasets.Dataset:
    """The held-out samples that have a target."""
    starts = range(0, len(rows), _BATCH)
    made = [encoder(rows.data[start : start + _BATCH], range(start, start + _BATCH)) for start in starts]
    columns = {name: [value for batch in made for value in batch[name]] for name in encoder.features()}
    faults = [
        (rows.locations[row], fault) for row, fault in zip(columns["row"], columns["fault"], strict=True) if fault
    ]
    if faults:
        raise complaint(faults, source)
    tokens = datasets.Dataset.from_dict(columns, features=encoder.features())
    return tokens.select([number for number, targets in enumerate(columns["targets"]) if targets])


def _samples(
    stream: datasets.IterableDataset, encoder: Encoder, kind: str, measured: set[bytes]
) -> datasets.IterableDataset:
    """The samples of a stream that have a target and equal none of the ``measured`` ones."""
    texts = id_columns(encoder.model_columns())
    told = left = 0

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        nonlocal told, left
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        good = [row for row in rows if find_kind(kind).is_usable(row)]
        before, left = left, left + len(rows) - len(good)
        if not good:
            _count(before, left)
            return {name: [] for name in encoder.features()}
        made = encoder({name: [row[name] for row in good] for name in names}, range(len(good)))
        left += len({row for row, fault in zip(made["row"], made["fault"], strict=True) if fault is not None})
        _count(before, left)
        for row, fault in zip(made["row"], made["fault"], strict=True):
            if fault is not None and told < _TOLD:
                told += 1
                warn(f"{good[row][LOCATION]}: {fault.partition(chr(10))[0]}; left out")
        return made

    def learnable(sample: Mapping[str, Any]) -> bool:
        if not sample["targets"]:
            return False
        return not sample["cut"] or digest({name: sample[name] for name in texts}) not in measured

    encoded = stream.map(
        encode, batched=True, batch_size=_BATCH, remove_columns=list(stream.features), features=encoder.features()
    )
    return encoded.filter(learnable).select_columns([*encoder.model_columns(), "length"])


def _count(before: int, now: int) -> None:
    """Say how many rows were left out, when there are ten times as many as when it was last said."""
    if now >= 10 and len(str(now)) > len(str(before)):
        warn(f"{now:,} rows left out so far: broken, empty, or none that can be samples")


def _nothing(
    settings: DataSettings, task: TaskSettings, encoder: Encoder, seed: int, source: str, kind: str
) -> DataError:
    """Why a stream gave no sample at all."""
    for row in stream_rows(settings, task.type, seed):
        if find_kind(kind).is_usable(row):
            made = encoder({name: [value] for name, value in row.items()}, [0])
            sample = {name: values[0] for name, values in made.items()}
            if sample["fault"] is not None:
                return complaint([(row[LOCATION], sample["fault"])], source)
            if sample["targets"]:
                return DataError(
                    f"nothing to learn in {source}: cut to {settings.max_length} tokens, each sample equals a held-out one",
                    "raise data.max_length, or hold out less: data.eval_fraction",
                )
            return nothing_learnable(sample, source, encoder, task)
    return DataError(f"nothing to learn in {source}: all rows are empty", "check data.columns")
