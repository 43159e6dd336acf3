"""Metrics log of a run, ``metrics.jsonl``: read, append, summarize; and the peak memory of this process."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakeet.files import write_file
from lorakeet.log import warn
from lorakeet.security.json_file import JsonError, parse_json

#: Bytes. Peak resident memory of this process before :func:`restart_peak`.
_earlier_peak = 0


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a ``metrics.jsonl``; one that a crash has damaged is left out, with all after it."""
    path = Path(path)
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
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


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    return max(_earlier_peak, peak_since_restart())


def restart_peak() -> None:
    """Set the peak of :func:`peak_since_restart` back to what is resident now, where the system can; Linux does."""
    global _earlier_peak
    _earlier_peak = peak_rss_bytes()
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")


def peak_since_restart() -> int:
    """Return the peak resident memory since :func:`restart_peak`, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage includes the parent's memory from before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
