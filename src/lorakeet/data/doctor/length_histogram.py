"""Lengths of samples, in four bytes a sample, and their histogram, for the terminal and as a picture."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorakeet.files import write_file

#: Bars of a histogram, at most.
_BARS = 12
#: Quantile. The last bar of a histogram holds all longer samples.
_MOST = 0.995


@dataclass(frozen=True)
class Bar:
    """Bar of a histogram: ``count`` samples with lengths from ``first`` to ``last``, both included."""

    first: int
    last: int
    count: int


class Lengths:
    """Lengths of samples in ``unit`` (tokens, or characters where there is no tokenizer)."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._values = array("I")

    def add(self, length: int) -> None:
        self._values.append(length)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> np.ndarray:
        """uint32 [samples]"""
        return np.array(self._values, dtype=np.uint32)

    def figures(self) -> dict[str, Any]:
        """Return median, 95th percentile, longest and the histogram, for JSON."""
        values = self.values
        if not len(values):
            return {"unit": self.unit, "median": None, "p95": None, "longest": None, "histogram": []}
        return {
            "unit": self.unit,
            "median": float(np.median(values)),
            "p95": float(np.quantile(values, 0.95)),
            "longest": int(values.max()),
            "histogram": [[bar.first, bar.last, bar.count] for bar in self.bars()],
        }

    def bars(self) -> list[Bar]:
        """Return a histogram of at most a dozen bars of equal, round width; the last one includes all longer samples."""
        values = self.values
        if not len(values):
            return []
        width = _round_up(max(1, np.quantile(values, _MOST) / (_BARS - 1)))
        edges = np.arange(0, int(np.quantile(values, _MOST)) + width + 1, width)
        inside = np.minimum(values // width, len(edges) - 2)
        counts = np.bincount(inside.astype(np.int64), minlength=len(edges) - 1)
        lasts = [*(edges[1:-1] - 1), max(edges[-1] - 1, values.max())]
        return [Bar(int(a), int(b), int(n)) for a, b, n in zip(edges, lasts, counts, strict=False)]


def _round_up(number: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50, ..."""
    size = 10 ** int(np.floor(np.log10(number)))
    return next(int(step * size) for step in (1, 2, 5, 10) if step * size >= number)


def draw_lengths(lengths: Lengths, path: str | Path, max_length: int | None = None, title: str = "") -> None:
    """Draw the histogram of ``lengths`` as a PNG, with a line where samples are cut; the file is written atomically.

    Args:
        lengths: of the samples.
        path: of the file.
        max_length: where samples are cut; None: no line.
        title: of the picture.

    Raises:
        OutputError: the folder cannot be written to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = lengths.values
    if len(values):
        end = float(np.quantile(values, _MOST))
        axes.hist(np.minimum(values, end), bins=min(60, max(5, int(end))), color="#6baed6", edgecolor="white")
        axes.axvline(float(np.median(values)), color="#08519c", linewidth=1.5, label=f"median {np.median(values):g}")
        if max_length is not None and max_length <= end:
            cut = int((values > max_length).sum())
            axes.axvline(
                max_length, color="#d94801", linewidth=1.5, label=f"max_length {max_length:,}: {cut:,} are cut"
            )
        axes.legend(frameon=False)
    axes.set_xlabel(f"{lengths.unit} per sample")
    axes.set_ylabel("samples")
    axes.set_title(title)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    with write_file(path) as aside:
        figure.savefig(aside, format="png")
