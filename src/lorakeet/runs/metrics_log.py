"""Metrics log of a run, ``metrics.jsonl``: read, append, summarize."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakeet.files import write_file
from lorakeet.log import warn
from lorakeet.security.json_file import JsonError, parse_json
from lorakeet.security.paths import exists


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a ``metrics.jsonl``; one that a crash has damaged is left out, with all after it."""
    path = Path(path)
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if exists(path) else []:
        try:
            found = parse_json(line)
        except JsonError:
            break
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            break
        lines.append(found)
    return lines


def append_metrics(path: str | Path, *lines: Mapping[str, Any]) -> None:
    """Add lines to a ``metrics.jsonl``: all of them, or none if the disk refuses.

    Raises:
        OSError: The file cannot be written.
    """
    text = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
    with Path(path).open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while text:
                text = text[file.write(text) :]
        except OSError:
            file.truncate(size)
            raise


class MetricsLog:
    """The ``metrics.jsonl`` of a run that trains: a line that the disk refuses is kept and written with a later one.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._pending: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """Return all lines, the pending ones too."""
        return [*read_metrics(self.path), *self._pending]

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line; a disk that refuses it gives a warning, the first time."""
        refused = bool(self._pending)
        self._pending.append(dict(line))
        try:
            append_metrics(self.path, *self._pending)
        except OSError as error:
            if not refused:
                warn(f"cannot write {self.path}: {error.strerror}; its lines are kept in memory and tried again")
            return
        self._pending.clear()

    def replace(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write these lines in place of all that are there.

        Raises:
            OutputError: The file cannot be written.
        """
        with write_file(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._pending.clear()


def first_and_last(lines: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the mean training loss of the first and of the last lines: a fifth of all each, one line to ten.

    The loss of a single step depends on its samples as much as on the model; means of several steps are comparable.
    """
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), (int, float))]
    if not losses:
        return float("nan"), float("nan")
    count = max(1, min(10, len(losses) // 5))
    return sum(losses[:count]) / count, sum(losses[-count:]) / count
