"""Rows that are read while the model is trained, in constant memory: ``data.stream``.

A pass goes over the sources in random order and draws from a buffer of ``data.shuffle_buffer`` rows; ``set_epoch``
gives the next pass another order. The same seed and epoch give the same order, so that a run goes on where it was left
with :func:`rest_of`. Processes and workers share the rows without reading one twice (``split_dataset_by_node``, a
``DataLoader`` with workers).

A stream's length is unknown, so rows are held out by a hash of their text. Each text gets a number from a hash of the
seed and its normalized content, as in :mod:`lorakeet.data.rows.split`. Texts with a number below ``data.eval_fraction`` of
all numbers are held out: at most a tenth of ``data.shuffle_buffer``. Each source gives equally many, from its beginning.
Every row with a held-out text is left out of the training part, wherever it is.
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
from lorakeet.data.read.record import Location, Locations
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import find_layout, merge_layouts, with_columns_of
from lorakeet.data.rows.kinds import Layout, RowError, canonical, find_kind
from lorakeet.data.rows.load import Rows, describe_sources
from lorakeet.data.rows.mixing import shares
from lorakeet.data.rows.split import normalized
from lorakeet.log import warn

#: Column of a stream that names the location of each row, for messages.
LOCATION = "location"
_WARNINGS = 3  # faults of a source that are logged in a pass
_TYPED = 1000  # records, of all sources together, that column types are inferred from


@dataclass(frozen=True)
class MappedSource:
    """Source with its layout."""

    source: DataSource
    layout: Layout

    def rows(self, *, warnings: int = _WARNINGS) -> Iterator[tuple[Location, dict[str, Any]]]:
        """Yield canonical rows; one with a fault has null in every column, and the first ``warnings`` are logged."""
        for record in self.source.rows(set(self.layout.columns.values())):
            fault = record.fault
            try:
                row = canonical(record, self.layout)
            except RowError as error:
                fault = error.fault
                row = canonical(replace(record, values=None), self.layout)
            yield record.location, row
            if fault is not None and warnings:
                warnings -= 1
                hint = f" ({fault.hint})" if fault.hint else ""
                warn(f"{record.location}: {fault.message}, left out{hint}")


def stream_rows(settings: DataSettings, task: TaskName, seed: int) -> datasets.IterableDataset:
    """Stream the training rows of ``settings.path``, in canonical columns and ``location`` (text), in random order.

    A row with a fault has null in every column but ``location``. With ``data.weights`` each row is drawn from a path with
    that probability; the pass ends with the first path that ends. ``info.description`` names the sources.

    Raises:
        DataError: there is no such data, its columns are not what ``task`` needs, or its sources are not of one kind.
    """
    mapped, layout = map_sources(settings, task)
    held_out = frozenset(_held_out(mapped, settings, seed))
    wanted = shares(settings)
    if wanted is None:
        stream = _stream(mapped, layout, held_out, settings, seed)
    else:
        parts = [[item for item in mapped if item.source.part == number] for number in range(len(wanted))]
        streams = [_stream(part, layout, held_out, settings, seed) for part in parts]
        stream = datasets.interleave_datasets(streams, wanted, seed=seed, stopping_strategy="first_exhausted")
        stream = stream if settings.limit is None else stream.take(settings.limit)
    stream = stream.shuffle(seed=seed, buffer_size=settings.shuffle_buffer)
    stream.info.description = _described(settings, mapped)
    return stream


def rest_of(stream: datasets.IterableDataset, count: int) -> datasets.IterableDataset:
    """Return the same pass of ``stream`` without its first ``count`` rows.

    ``stream.skip(count)`` is another pass: ``datasets`` keeps the order of the sources then, whatever the epoch.
    """
    rest = stream.filter(_is_after, with_indices=True, fn_kwargs={"count": count})
    rest.set_epoch(stream.epoch)
    return rest


def _is_after(row: dict[str, Any], index: int, count: int) -> bool:
    return index >= count


def held_out_rows(settings: DataSettings, task: TaskName, seed: int) -> Rows:
    """Return the rows that :func:`stream_rows` leaves out, each text once; none where ``data.eval_fraction`` is 0.

    Raises:
        DataError: as :func:`stream_rows`.
    """
    mapped, layout = map_sources(settings, task)
    found = list(_held_out(mapped, settings, seed).values())
    schema = layout.features()
    data = datasets.Dataset.from_dict({name: [row.get(name) for _, row in found] for name in schema}, features=schema)
    data.info.description = _described(settings, mapped)
    return Rows(data, Locations(location for location, _ in found), layout, data.info.description)


def _described(settings: DataSettings, mapped: Sequence[MappedSource]) -> str:
    return f"{describe_sources(settings, [(item.source, item.layout) for item in mapped])}, streamed"


def map_sources(settings: DataSettings, task: TaskName) -> tuple[list[MappedSource], Layout]:
    """Return the sources with their layouts, and one layout for all.

    Raises:
        DataError: as :func:`stream_rows`.
    """
    sources = find_sources(settings)
    count = max(_TYPED // len(sources), 20)
    layouts = {source.name: find_layout(source.head_types(count), settings, task, source.name) for source in sources}
    merged = merge_layouts(layouts)
    whole = with_columns_of(merged, layouts)
    return [MappedSource(source, replace(whole[source.name], types=merged.types)) for source in sources], merged


def _stream(
    mapped: Sequence[MappedSource], layout: Layout, held_out: frozenset[int], settings: DataSettings, seed: int
) -> datasets.IterableDataset:
    # Each source is a shard of its own; a limit counts over all of them, so they are one.
    limit = None if settings.weights else settings.limit
    shards = [(item,) for item in mapped] if limit is None else [tuple(mapped)]
    arguments = {"shards": shards, "held_out": held_out, "limit": limit, "seed": seed}
    schema = datasets.Features({**layout.features(), LOCATION: datasets.Value("string")})
    return datasets.IterableDataset.from_generator(_learned, features=schema, gen_kwargs=arguments)


def _learned(
    shards: Sequence[Sequence[MappedSource]], held_out: frozenset[int], limit: int | None, seed: int
) -> Iterator[dict[str, Any]]:
    for shard in shards:
        rows = ((row, location, item.layout.kind) for item in shard for location, row in item.rows())
        for row, location, kind in islice(rows, limit):
            if not held_out or split_number(row, kind, seed) not in held_out:
                yield {**row, LOCATION: str(location)}


def _held_out(
    mapped: Sequence[MappedSource], settings: DataSettings, seed: int
) -> dict[int, tuple[Location, dict[str, Any]]]:
    """Return the held-out rows by the number of their text; if none is below the bound, the row with the lowest."""
    if not settings.eval_fraction:
        return {}
    most = max(settings.shuffle_buffer // 10, 1)
    quota = max(most // len(mapped), 1)
    left = math.inf if settings.limit is None or settings.weights else settings.limit
    held_out: dict[int, tuple[Location, dict[str, Any]]] = {}
    lowest: tuple[int, tuple[Location, dict[str, Any]]] | None = None
    for item in mapped:
        until = min(len(held_out) + quota, most)
        for found in item.rows(warnings=0):
            if left == 0 or (len(held_out) == until and left == math.inf):
                break
            left -= 1
            number = split_number(found[1], item.layout.kind, seed)
            if number is None or len(held_out) == until:
                continue
            if number < settings.eval_fraction * 2**64:
                held_out.setdefault(number, found)
            elif lowest is None or number < lowest[0]:
                lowest = number, found
    return held_out if held_out or lowest is None else dict([lowest])


def split_number(row: Mapping[str, Any], kind: str, seed: int) -> int | None:
    """Return the number from 0 to 2^64 that decides whether a canonical row is held out; None without content."""
    found = find_kind(kind)
    if row.get(found.content_columns()[0]) is None:
        return None
    inner = hashlib.sha256(normalized(found.content(row)).encode()).digest()
    return int.from_bytes(hashlib.sha256(b"%d:" % seed + inner).digest()[:8], "big")
