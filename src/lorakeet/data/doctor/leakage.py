"""Leakage between the sides of a split: rows of test or validation files next to the training data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lorakeet.config import DataSettings, TaskName
from lorakeet.data.doctor.duplicates import Inputs, hash_inputs
from lorakeet.data.read.formats import SUFFIXES
from lorakeet.data.read.record import Location
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import find_layout
from lorakeet.data.rows.kinds import RowError, canonical, find_kind
from lorakeet.errors import DataError
from lorakeet.security.paths import is_file

#: Rows of a file from which its columns and their types are inferred.
_HEAD = 1000
#: Words of file names that say another split.
_OTHERS = ("test", "validation", "valid", "val", "dev", "eval", "evaluation")


def other_side(sources: list[DataSource], settings: DataSettings) -> list[DataSource]:
    """Find files named for another split than ``settings.split`` beside ``sources``; none for data of the hub."""
    mine = {Path(source.name).resolve() for source in sources if source.format != "hub"}
    names = [name for name in _OTHERS if name != settings.split]
    found: list[DataSource] = []
    for folder in sorted({path.parent for path in mine}):
        for path in sorted(folder.iterdir()):
            words = set(re.split(r"[^a-z]+", path.stem.lower()))
            if is_file(path) and path.suffix.lower() in SUFFIXES and path.resolve() not in mine and words & set(names):
                try:
                    found += find_sources(settings.model_copy(update={"path": str(path)}))
                except DataError:  # an unreadable file cannot be compared
                    continue
    return found


def other_rows(sources: list[DataSource], settings: DataSettings, task: TaskName) -> Iterator[tuple[Location, Inputs]]:
    """Yield the location and the hashes of each usable row on the other side."""
    for source in other_side(sources, settings):
        types = source.usual_types(list(islice(source.rows(), _HEAD)))
        try:
            layout = find_layout(types, settings, task, source.name)
        except DataError:
            continue
        kind = find_kind(layout.kind)
        for record in source.rows():
            try:
                values = canonical(record, layout)
            except RowError:
                continue
            if kind.is_usable(values):
                yield record.location, hash_inputs(values, kind)
