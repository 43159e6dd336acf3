"""Pictures of data and of predictions as PNG: confusion matrix, lengths, label counts. Colours suit colour-blind eyes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lorakeet.files import write_file
from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.tasks.metrics import Array

#: Classes that a confusion matrix shows one by one, and labels that a count does.
MOST = 30
#: Letters of a name; of a longer one beginning and end are shown.
LETTERS = 24
DARK, GREY = "#08306b", "#595959"
_BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#d6e6f4", "#7ab6d9", "#2676b8", DARK])


def draw_confusion(
    labels: Array, predicted: Array, names: Sequence[str], path: str | Path, title: str = "", most: int = MOST
) -> None:
    """Confusion matrix: a row for each true class, its colours the shares of the row; the diagonal is what was right.

    Of more than ``most`` classes the ones with most errors are shown; all others are one row and column.

    Args:
        labels, predicted: numbers of classes, of one shape; where the label is -100, both are left out.
        names: of the classes, by number.
        path: of the PNG.
        title: Above the picture; the accuracy is put below it.
        most: Classes shown one by one.
    """
    counts = confusion(labels, predicted, len(names))
    accuracy, total = np.trace(counts) / max(counts.sum(), 1), int(counts.sum())
    note = f"accuracy {accuracy:.1%} of {total:,}"
    if len(names) > most:
        counts, names = most_confused(counts, names, most)
        note += f"; the {most} classes with most errors, all others together"
    size = len(names)
    side = max(3.2, 0.42 * size if size > 12 else 0.62 * size)
    figure = _figure(side + 2.6, side + 1.7)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap=_BLUES, vmin=0, vmax=1)
    short = [_short(name) for name in names]
    upright = size > 6 or max(map(len, short)) > 9
    axes.set_xticks(range(size), short, rotation=90 if upright else 0)
    axes.set_yticks(range(size), short)
    axes.set_xlabel("predicted", labelpad=8)
    axes.set_ylabel("true", labelpad=8)
    _write_cells(axes, counts, shares)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e3e3e3", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, aspect=30)
    bar.set_label("share of the true class")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    _save(figure, axes, path, title, note)


def confusion(labels: Array, predicted: Array, classes: int) -> Array:
    """Counts [true class, predicted class]."""
    counts = labels != IGNORE_INDEX
    pairs = labels[counts].astype(np.int64) * classes + predicted[counts].astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def most_confused(counts: Array, names: Sequence[str], most: int) -> tuple[Array, list[str]]:
    """The ``most`` classes with most errors (missed and wrongly given), in their order, and the others as the last one."""
    errors = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    shown = np.sort(np.argsort(-errors, kind="stable")[:most])
    place = np.full(len(names), most)
    place[shown] = np.arange(most)
    merged = np.zeros((most + 1, most + 1), dtype=counts.dtype)
    np.add.at(merged, (place[:, None], place[None, :]), counts)
    return merged, [*(names[number] for number in shown), f"{len(names) - most} others"]


def _write_cells(axes: Any, counts: Array, shares: Array) -> None:
    """The count in every cell that has one, in a colour that can be read on the cell's."""
    size = len(counts)
    letters = 10 if size <= 12 else 8 if size <= 20 else 7
    for row, column in zip(*np.nonzero(counts), strict=True):
        number = int(counts[row, column])
        text = f"{number:,}" if number < 10_000 else f"{number / 1000:.0f}k"
        if size <= 8:
            text += f"\n{shares[row, column]:.0%}"
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=letters)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, axes: Any, path: str | Path, title: str, note: str) -> None:
    """Title and note above the picture, then the file."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24 if title else 12)
    above = {"xycoords": "axes fraction", "xytext": (0, 8), "textcoords": "offset points"}
    axes.annotate(note, (0, 1), **above, fontsize=9, color=GREY)
    with write_file(path) as aside:
        figure.savefig(aside, format="png")


def _short(name: str) -> str:
    half = LETTERS // 2
    return name if len(name) <= LETTERS else f"{name[: half - 1]}…{name[-half:]}"
