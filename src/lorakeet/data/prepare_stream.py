"""Preparation of a stream: data that is read and encoded during training, in constant memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor.examine import examine_heads
from lorakeet.data.encode.encoder import Encoder, cannot_encode
from lorakeet.data.encode.kinds import make_encoder
from lorakeet.data.prepare_report import PrepareReport
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
    sample_columns,
    shape,
)
from lorakeet.data.read.record import Fault
from lorakeet.data.rows.kinds import find_kind
from lorakeet.data.rows.label_set import given_labels
from lorakeet.data.rows.load import Rows, usable
from lorakeet.data.rows.stream import LOCATION, held_out_rows, map_sources, stream_rows
from lorakeet.errors import DataError
from lorakeet.log import silent, warn

#: Samples that are encoded before training, to measure lengths.
_HEAD = 256
#: Rows that are tokenized together.
_BATCH = 64
#: Rows that cannot be samples and are logged; further ones are counted.
_LOGGED = 3
#: Rows that are examined before training, of all sources together.
_CHECKED = 2000
#: Codes that are logged later: when the row is read, or when no row is left.
_LOGGED_LATER = ("broken", "encoding", "wrong_type", "half_character", "tag_count", "nothing")


def prepare_stream(
    settings: DataSettings,
    task: TaskSettings,
    tokenizer: Any,
    *,
    seed: int,
    max_positions: int | None = None,
    vocabulary: int | None = None,
) -> Prepared:
    """Prepare a stream: the training part is an ``IterableDataset``, the held-out part is in memory.

    The beginning is examined as by :mod:`lorakeet.data.doctor.examine`. Rows that cannot be read or encoded are left out.
    The first few are logged, and their number at 10, 100, 1,000 and so on.

    Args:
        settings: of the data.
        task: to be trained; its type is concrete.
        tokenizer: of ``transformers``.
        seed: chooses the held-out rows and the order.
        max_positions: tokens of the longest sample that the model takes; None: no limit.
        vocabulary: rows of the model's embedding; None: enough for every token.

    Raises:
        DataError: as :func:`lorakeet.data.prepare.prepare`, as far as the beginning of the data shows.
    """
    held = held_out_rows(settings, task.type, seed)
    layout, kind, source = held.layout, held.layout.kind, held.description
    label_column = find_kind(kind).labels
    labels = given_labels(layout.types[label_column], task) if label_column else None
    checked, sound = _check(settings, task, tokenizer)
    encoder = make_encoder(layout, task, settings, tokenizer, labels, vocabulary)
    rows = held.select(usable(held.data, kind))
    tokens = _held_out(rows, encoder, source)
    measured = {digest(sample) for sample in tokens.select_columns(id_columns(encoder.model_columns()))}
    train = _samples(stream_rows(settings, task.type, seed), encoder, kind, measured)
    located = _samples(stream_rows(settings, task.type, seed), encoder, kind, measured, columns=[LOCATION])
    head = list(islice(_samples(stream_rows(settings, task.type, seed), encoder, kind, measured), _HEAD))
    if not head:
        raise _nothing(settings, task, encoder, seed, source, kind)
    check_length(max(sample["length"] for sample in [*head, *tokens]), max_positions)
    counts, everything = count_columns(tokens), np.arange(len(tokens))
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
        **figures("held_out", counts, everything),
        **shape(counts, everything),
        max_length=settings.max_length,
        end_token=tokenizer.eos_token,
        damaged=0,
        labels=None,
        streamed=True,
        checked=checked,
        sound=sound,
        content_hash=hashlib.sha256(json.dumps([source, settings.model_dump(), seed]).encode()).hexdigest(),
    )
    held_out = tokens if len(tokens) else None
    return finish(
        report, encoder, labels, layout, (train, held_out), usable=rows.data, locations=StreamLocations(located)
    )


def _check(settings: DataSettings, task: TaskSettings, tokenizer: Any) -> tuple[int, int]:
    """Log the issues of the beginning of each source; returns the rows examined, and how many of them are usable.

    Raises:
        DataError: something would spoil the run.
    """
    mapped, _ = map_sources(settings, task.type)
    heads = [(item.source, item.layout) for item in mapped]
    found = examine_heads(heads, task, settings=settings, most=_CHECKED, tokenizer=tokenizer)
    among = f" among the first {found.rows:,} rows"
    later: tuple[str, ...] = _LOGGED_LATER
    if found.count("one_label") and found.rows >= _CHECKED // len(mapped):  # else no source has more
        later = (*later, "one_label")
        warn(
            f"the first {found.rows:,} rows all have the label {next(iter(found.labels))!r}: a stream is shuffled within "
            f"{settings.shuffle_buffer:,} rows (data.shuffle_buffer), so mix files that are sorted by label before"
        )
    log_issues((group for group in found.issues if group.code not in later), among)
    return found.rows, found.usable


def _held_out(rows: Rows, encoder: Encoder, source: str) -> datasets.Dataset:
    """Encode the held-out rows; returns the samples that have a target."""
    columns: dict[str, list[Any]] = {name: [] for name in encoder.features()}
    faults: list[tuple[int, Fault]] = []
    for start in range(0, len(rows), _BATCH):
        encoded = encoder(rows.data[start : start + _BATCH], range(start, start + _BATCH))
        faults += encoded.faults
        for name, values in encoded.columns.items():
            columns[name] += values
    if faults:
        raise cannot_encode([(rows.locations[row], fault) for row, fault in faults], source)
    tokens = datasets.Dataset.from_dict(columns, features=encoder.features())
    return tokens.select([number for number, targets in enumerate(columns["targets"]) if targets])


@dataclass(frozen=True)
class StreamLocations:
    """Locations of the samples of a stream, found by reading it once more.

    Attributes:
        stream: Samples with their location alone.
    """

    stream: datasets.IterableDataset

    def of_samples(self, epoch: int, start: int, stop: int) -> list[str]:
        """Return the locations of the samples from number ``start`` to ``stop`` of a pass over the stream."""
        self.stream.set_epoch(epoch)
        with silent():  # rows that are left out were named by the first reading
            return [sample[LOCATION] for sample in islice(self.stream, start, stop)]


def _samples(
    stream: datasets.IterableDataset,
    encoder: Encoder,
    kind: str,
    measured: set[bytes],
    columns: list[str] | None = None,
) -> datasets.IterableDataset:
    """Encode a stream; yields the samples that have a target and differ from all ``measured`` ones.

    Args:
        stream: Rows in canonical columns, with their location.
        encoder: Makes the samples.
        kind: Of the rows.
        measured: Digests of the held-out samples.
        columns: Columns to keep; None: those of a sample.
    """
    texts = id_columns(encoder.model_columns())
    features = datasets.Features({**encoder.features(), LOCATION: datasets.Value("string")})
    logged = left = 0

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        nonlocal logged, left
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        good = [row for row in rows if find_kind(kind).is_usable(row)]
        before, left = left, left + len(rows) - len(good)
        if not good:
            _count(before, left)
            return {name: [] for name in features}
        encoded = encoder({name: [row[name] for row in good] for name in names}, range(len(good)))
        faults = dict(encoded.faults)
        left += len(faults)
        _count(before, left)
        for row, fault in faults.items():
            if logged < _LOGGED:
                logged += 1
                warn(f"{good[row][LOCATION]}: {fault.message.partition(chr(10))[0]}; left out")
        return {**encoded.columns, LOCATION: [good[row][LOCATION] for row in encoded.columns["row"]]}

    def learnable(sample: Mapping[str, Any]) -> bool:
        if not sample["targets"]:
            return False
        return not sample["cut"] or digest({name: sample[name] for name in texts}) not in measured

    encoded = stream.map(
        encode, batched=True, batch_size=_BATCH, remove_columns=list(stream.features), features=features
    )
    return encoded.filter(learnable).select_columns(columns or sample_columns(encoder))


def _count(before: int, now: int) -> None:
    """Log how many rows were left out, at every power of ten."""
    if now >= 10 and len(str(now)) > len(str(before)):
        warn(f"{now:,} rows left out so far: broken, empty, or none that can be samples")


def _nothing(
    settings: DataSettings, task: TaskSettings, encoder: Encoder, seed: int, source: str, kind: str
) -> DataError:
    """Return the error for a stream that gave no sample at all.

    Args:
        settings: of the data.
        task: to be trained.
        encoder: of the rows.
        seed: of the order.
        source: name of the data.
        kind: of the rows.
    """
    for row in stream_rows(settings, task.type, seed):
        if find_kind(kind).is_usable(row):
            encoded = encoder({name: [value] for name, value in row.items()}, [0])
            if encoded.faults:
                return cannot_encode([(row[LOCATION], fault) for _, fault in encoded.faults], source)
            sample = {name: values[0] for name, values in encoded.columns.items()}
            if sample["targets"]:
                return DataError(
                    f"nothing to learn in {source}: cut to {settings.max_length} tokens, each sample equals a held-out one",
                    "raise data.max_length, or hold out less: data.eval_fraction",
                )
            return nothing_learnable(sample, source, encoder, task)
    return DataError(f"nothing to learn in {source}: all rows are empty", "check data.columns")
