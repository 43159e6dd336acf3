"""Rows that are read while they are learned, in constant memory: ``data.stream``.

A pass goes over the sources in random order and draws from a buffer of ``data.shuffle_buffer`` rows; ``set_epoch``
gives the next pass another order. The same seed and epoch give the same order, so that a run goes on where it was left
with :func:`rest_of`. Processes and workers share the rows without reading one twice (``split_dataset_by_node``, a
``DataLoader`` with workers).

What is held out cannot be chosen from all rows, since nobody has seen them. Each text gets a number from a hash of the
seed and its normalised content, as in :mod:`lorakeet.data.rows.split`; those below ``data.eval_fraction`` of all numbers are
held out until there are a tenth of ``data.shuffle_buffer``, equally many from the beginning of each source. Every row
with a text that is held out is left out of the training part, wherever it stands.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import datasets

from lorakeet.config import DataSettings, TaskName
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import Kind, Layout, find_layout, merge_layouts
from lorakeet.data.rows.content import CONTENT, content
from lorakeet.data.rows.load import Rows, describe_sources
from lorakeet.data.rows.mixing import shares
from lorakeet.data.rows.normalize import RowError, canonical, features
from lorakeet.data.rows.split import normalized
from lorakeet.log import warn

_TOLD = 3  # faults of a source that are said in a pass
_HEAD = 1000  # records, of all sources together, that tell the types of their columns


@dataclass(frozen=True)
class Laid:
    """A source and which of its columns plays which part."""

    source: DataSource
    layout: Layout

    def rows(self, *, told: int = _TOLD) -> Iterator[dict[str, Any]]:
        """Canonical rows; one with a fault has null in every column, and the first ``told`` of them are said."""
        for row in self.source.rows(set(self.layout.columns.values())):
            fault, hint = row.fault, row.hint
            try:
                yield canonical(row, self.layout)
            except RowError as error:
                fault, hint = error.fault, error.hint
                yield canonical(replace(row, values=None), self.layout)
            if fault is not None and told:
                told -= 1
                warn(f"{row.where}: {fault}, left out{f' ({hint})' if hint else ''}")


def stream_rows(settings: DataSettings, task: TaskName, seed: int) -> datasets.IterableDataset:
    """The rows of ``settings.path`` that are learned, in canonical columns and ``place``, in random order.

    A row with a fault has null in every column but ``place``. With ``data.weights`` each row is drawn from a path with
    that probability; the pass ends with the first path that ends. ``info.description`` says what is read.

    Raises:
        DataError: there is no such data, its columns are not what ``task`` needs, or its sources are not of one kind.
    """
    laid, layout = lay_out(settings, task)
    held_out = frozenset(_held_out(laid, settings, seed))
    wanted = shares(settings)
    if wanted is None:
        stream = _stream(laid, layout, held_out, settings, seed)
    else:
        parts = [[item for item in laid if item.source.part == number] for number in range(len(wanted))]
        streams = [_stream(part, layout, held_out, settings, seed) for part in parts]
        stream = datasets.interleave_datasets(streams, wanted, seed=seed, stopping_strategy="first_exhausted")
        stream = stream if settings.limit is None else stream.take(settings.limit)
    stream = stream.shuffle(seed=seed, buffer_size=settings.shuffle_buffer)
    stream.info.description = _described(settings, laid)
    return stream


def rest_of(stream: datasets.IterableDataset, count: int) -> datasets.IterableDataset:
    """The same pass of ``stream`` without its first ``count`` rows.

    ``stream.skip(count)`` is another pass: ``datasets`` keeps the order of the sources then, whatever the epoch.
    """
    rest = stream.filter(_is_after, with_indices=True, fn_kwargs={"count": count})
    rest.set_epoch(stream.epoch)
    return rest


def _is_after(row: dict[str, Any], index: int, count: int) -> bool:
    return index >= count


def held_out_rows(settings: DataSettings, task: TaskName, seed: int) -> Rows:
    """The rows that :func:`stream_rows` leaves out, each text once; no rows where ``data.eval_fraction`` is 0.

    Raises:
        DataError: as :func:`stream_rows`.
    """
    laid, layout = lay_out(settings, task)
    rows = list(_held_out(laid, settings, seed).values())
    schema = features(layout)
    data = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in schema}, features=schema)
    data.info.description = _described(settings, laid)
    return Rows(data, layout, data.info.description)


def _described(settings: DataSettings, laid: Sequence[Laid]) -> str:
    return f"{describe_sources(settings, [(item.source, item.layout) for item in laid])}, streamed"


def lay_out(settings: DataSettings, task: TaskName) -> tuple[list[Laid], Layout]:
    """The sources with their layouts, and one layout for all.

    Raises:
        DataError: as :func:`stream_rows`.
    """
    sources = find_sources(settings)
    count = max(_HEAD // len(sources), 20)
    layouts = [find_layout(source.head_types(count), settings, task, source.name) for source in sources]
    merged = merge_layouts(dict(zip((source.name for source in sources), layouts, strict=True)))
    return [
        Laid(source, replace(layout, types=merged.types)) for source, layout in zip(sources, layouts, strict=True)
    ], merged


def _stream(
    laid: Sequence[Laid], layout: Layout, held_out: frozenset[int], settings: DataSettings, seed: int
) -> datasets.IterableDataset:
    # Each source is a shard of its own; a limit counts over all of them, so they are one.
    limit = None if settings.weights else settings.limit
    shards = [(item,) for item in laid] if limit is None else [tuple(laid)]
    arguments = {"shards": shards, "held_out": held_out, "limit": limit, "seed": seed}
    return datasets.IterableDataset.from_generator(_learned, features=features(layout), gen_kwargs=arguments)


def _learned(
    shards: Sequence[Sequence[Laid]], held_out: frozenset[int], limit: int | None, seed: int
) -> Iterator[dict[str, Any]]:
    for shard in shards:
        rows = ((row, item.layout.kind) for item in shard for row in item.rows())
        for row, kind in islice(rows, limit):
            if not held_out or ticket(row, kind, seed) not in held_out:
                yield row


def _held_out(laid: Sequence[Laid], settings: DataSettings, seed: int) -> dict[int, dict[str, Any]]:
    """The rows that are held out, by the number of their text; if none is below the bound, the one with the lowest."""
    if not settings.eval_fraction:
        return {}
    most = max(settings.shuffle_buffer // 10, 1)
    quota = max(most // len(laid), 1)
    left = math.inf if settings.limit is None or settings.weights else settings.limit
    held_out: dict[int, dict[str, Any]] = {}
    lowest: tuple[int, dict[str, Any]] | None = None
    for item in laid:
        until = min(len(held_out) + quota, most)
        for row in item.rows(told=0):
            if left == 0 or (len(held_out) == until and left == math.inf):
                break
            left -= 1
            number = ticket(row, item.layout.kind, seed)
            if number is None or len(held_out) == until:
                continue
            if number < settings.eval_fraction * 2**64:
                held_out.setdefault(number, row)
            elif lowest is None or number < lowest[0]:
                lowest = number, row
    return held_out if held_out or lowest is None else dict([lowest])


def ticket(row: Mapping[str, Any], kind: Kind, seed: int) -> int | None:
    """The number from 0 to 2^64 that decides whether a canonical row is held out; None where it has no content."""
    if row.get(CONTENT[kind][0]) is None:
        return None
    inner = hashlib.sha256(normalized(content(row, kind)).encode()).digest()
    return int.from_bytes(hashlib.sha256(b"%d:" % seed + inner).digest()[:8], "big")
