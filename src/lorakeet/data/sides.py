"""The other side of a split: test or validation files that lie beside the data."""

from __future__ import annotations

import re
from pathlib import Path

from lorakeet.config import DataSettings
from lorakeet.data.formats import SUFFIXES
from lorakeet.data.read import Source, find_sources
from lorakeet.errors import DataError

_OTHERS = ("test", "validation", "valid", "val", "dev", "eval", "evaluation")


def other_side(sources: list[Source], settings: DataSettings) -> list[Source]:
    """Files named for another split than ``settings.split``, in the folders of ``sources``; none for data of the hub."""
    mine = {Path(source.name).resolve() for source in sources if source.format != "hub"}
    names = [name for name in _OTHERS if name != settings.split]
    found: list[Source] = []
    for folder in sorted({path.parent for path in mine}):
        for path in sorted(folder.iterdir()):
            words = set(re.split(r"[^a-z]+", path.stem.lower()))
            if path.is_file() and path.suffix.lower() in SUFFIXES and path.resolve() not in mine and words & set(names):
                try:
                    found += find_sources(settings.model_copy(update={"path": str(path)}))
                except DataError:  # what cannot be read cannot be compared
                    continue
    return found
