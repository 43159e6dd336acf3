"""Metrics log of a run, ``metrics.jsonl``: read, append, summarize; and the peak memory of this process."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a ``metrics.jsonl``; a last line truncated by a crash is left out."""
    path = Path(path)
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def append_metrics(path: str | Path, line: Mapping[str, Any]) -> None:
    """Add one line to a ``metrics.jsonl``."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def first_and_last(lines: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the mean training loss of the first and of the last lines: a fifth of all each, one line to ten.

    The loss of a single step depends on its samples as much as on the model; means of several steps are comparable.
    """
    losses = [line["loss"] for line in lines if "loss" in line]
    if not losses:
        return float("nan"), float("nan")
    count = max(1, min(10, len(losses) // 5))
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage includes the parent's memory from before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
