"""The other side of a split: test or validation files that lie beside the data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lorakeet.config import DataSettings, TaskName
from lorakeet.data.doctor.checks import check_row
from lorakeet.data.read.formats import SUFFIXES
from lorakeet.data.read.source import DataSource, find_sources
from lorakeet.data.rows.column_mapping import find_layout
from lorakeet.data.rows.kinds import RowError, canonical
from lorakeet.errors import DataError

_HEAD = 1000  # rows that tell the columns of a file and their types
_OTHERS = ("test", "validation", "valid", "val", "dev", "eval", "evaluation")


def other_side(sources: list[DataSource], settings: DataSettings) -> list[DataSource]:
    """Files named for another split than ``settings.split``, in the folders of ``sources``; none for data of the hub."""
    mine = {Path(source.name).resolve() for source in sources if source.format != "hub"}
    names = [name for name in _OTHERS if name != settings.split]
    found: list[DataSource] = []
    for folder in sorted({path.parent for path in mine}):
        for path in sorted(folder.iterdir()):
            words = set(re.split(r"[^a-z]+", path.stem.lower()))
            if path.is_file() and path.suffix.lower() in SUFFIXES and path.resolve() not in mine and words & set(names):
                try:
                    found += find_sources(settings.model_copy(update={"path": str(path)}))
                except DataError:  # what cannot be read cannot be compared
                    continue
    return found


def other_rows(
    sources: list[DataSource], settings: DataSettings, task: TaskName
) -> Iterator[tuple[str, int, Mapping[str, Any], str]]:
    """Source, place, canonical columns and kind of each row on the other side that something could be learned from."""
    for source in other_side(sources, settings):
        types = source.usual_types(list(islice(source.rows(), _HEAD)))
        try:
            layout = find_layout(types, settings, task, source.name)
        except DataError:
            continue
        for row in source.rows():
            try:
                values = canonical(row, layout)
            except RowError:
                continue
            if not check_row(values, layout.kind).keys() & {"null", "empty"}:
                yield source.name, row.location.number, values, layout.kind
