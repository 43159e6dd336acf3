"""Plots as PNG: confusion matrix and loss curve. Colors are distinguishable for color-blind readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from lorakeet.files import write_file
from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.tasks.metrics import Array

#: Classes that a confusion matrix shows one by one.
MAX_CLASSES = 30
#: Letters of a name that are shown; a longer name is shortened in the middle.
MAX_LETTERS = 24
#: Colors of curves, distinguishable for color-blind readers (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
DARK, GREY = "#08306b", "#595959"
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#d6e6f4", "#7ab6d9", "#2676b8", DARK])


def draw_confusion(
    labels: Array,
    predicted: Array,
    names: Sequence[str],
    path: str | Path,
    title: str = "",
    max_classes: int = MAX_CLASSES,
) -> None:
    """Draw a confusion matrix: a row for each true class, colored by the shares of the row.

    Of more than ``max_classes`` classes those with most errors are shown; all others share a row and a column.

    Args:
        labels, predicted: Ids of classes, of one shape; positions with the label -100 are left out.
        names: Names of the classes, by id.
        path: Path of the PNG.
        title: Title of the plot; the accuracy is put below it.
        max_classes: Classes shown one by one.
    """
    counts = confusion(labels, predicted, len(names))
    accuracy, total = np.trace(counts) / max(counts.sum(), 1), int(counts.sum())
    note = f"accuracy {accuracy:.1%} of {total:,}"
    if len(names) > max_classes:
        counts, names = most_confused(counts, names, max_classes)
        note += f"; the {max_classes} classes with most errors, all others together"
    size = len(names)
    side = max(3.2, 0.42 * size if size > 12 else 0.62 * size)
    figure = new_figure(side + 2.6, side + 1.7)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap=BLUES, vmin=0, vmax=1)
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
    save_figure(figure, axes, path, title, note)


def confusion(labels: Array, predicted: Array, classes: int) -> Array:
    """Count [true class, predicted class]."""
    counts = labels != IGNORE_INDEX
    pairs = labels[counts].astype(np.int64) * classes + predicted[counts].astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def most_confused(counts: Array, names: Sequence[str], max_classes: int) -> tuple[Array, list[str]]:
    """Merge all but the ``max_classes`` classes with most errors (missed or wrongly predicted) into a last class."""
    errors = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    shown = np.sort(np.argsort(-errors, kind="stable")[:max_classes])
    position = np.full(len(names), max_classes)
    position[shown] = np.arange(max_classes)
    merged = np.zeros((max_classes + 1, max_classes + 1), dtype=counts.dtype)
    np.add.at(merged, (position[:, None], position[None, :]), counts)
    return merged, [*(names[number] for number in shown), f"{len(names) - max_classes} others"]


def _write_cells(axes: Any, counts: Array, shares: Array) -> None:
    """Write the count into every non-empty cell, in a color that is legible on the cell's."""
    size = len(counts)
    letters = 10 if size <= 12 else 8 if size <= 20 else 7
    for row, column in zip(*np.nonzero(counts), strict=True):
        number = int(counts[row, column])
        text = f"{number:,}" if number < 10_000 else f"{number / 1000:.0f}k"
        if size <= 8:
            text += f"\n{shares[row, column]:.0%}"
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=letters)


def smoothed(losses: list[float], weight: float) -> list[float]:
    """Return the exponential moving average, corrected for its start as Adam corrects its moments."""
    values, mean, norm = [], 0.0, 0.0
    for loss in losses:
        mean = weight * mean + (1 - weight) * loss
        norm = weight * norm + (1 - weight)
        values.append(mean / norm)
    return values


def draw_loss_curve(lines: Iterable[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw training loss (as logged and as moving average) and held-out losses as a PNG.

    Args:
        lines: Lines of ``metrics.jsonl``.
        path: Path of the PNG.
        title: Title of the plot.
    """
    lines = list(lines)
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    if trained:
        steps, losses = map(list, zip(*trained, strict=True))
        axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, as logged")
        axes.plot(steps, smoothed(losses, 0.9), color="#08519c", linewidth=2, label="training, moving average")
    if held_out:
        steps, losses = map(list, zip(*held_out, strict=True))
        axes.plot(steps, losses, "o--", color="#d94801", markersize=7, linewidth=1, label="held out")
        for at in {0, len(steps) - 1}:
            axes.annotate(
                f"{losses[at]:.3f}",
                (steps[at], losses[at]),
                xytext=(0, 9),
                textcoords="offset points",
                ha="left" if at == 0 else "right",
                color="#d94801",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token (nats)")
    axes.set_title(title)
    axes.margins(x=0.02, y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if trained or held_out:
        axes.legend(frameon=False)
    with write_file(path) as aside:
        figure.savefig(aside, format="png")


def draw_spectra(lines: Iterable[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw the effective rank of the update over the steps, a curve for each kind of layer, as a PNG.

    Args:
        lines: Lines of ``metrics.jsonl``; those with a ``spectrum`` are drawn.
        path: Path of the PNG.
        title: Title of the plot.
    """
    found = [(line["step"], line["spectrum"]) for line in lines if "spectrum" in line]
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    kinds = sorted({kind for _, spectrum in found for kind in spectrum})
    for kind, color in zip(kinds, COLORS * len(kinds), strict=False):
        points = [(step, spectrum[kind]["effective_rank"]) for step, spectrum in found if kind in spectrum]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=5, label=kind)
    largest = max(kind["r"] for _, spectrum in found for kind in spectrum.values())
    axes.axhline(largest, color=GREY, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.08 * largest)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("effective rank")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)
    save_figure(figure, axes, path, title, f"directions that the update of a layer uses, of r = {largest} (dashed)")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of this size, in inches."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, axes: Any, path: str | Path, title: str, note: str) -> None:
    """Put title and note above the plot, then write the file.

    Args:
        figure: The figure to write.
        axes: The upper plot of it.
        path: Path of the PNG.
        title: Title of the plot.
        note: Line below the title.
    """
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24 if title else 12)
    above = {"xycoords": "axes fraction", "xytext": (0, 8), "textcoords": "offset points"}
    axes.annotate(note, (0, 1), **above, fontsize=9, color=GREY)
    with write_file(path) as aside:
        figure.savefig(aside, format="png")


def _short(name: str) -> str:
    half = MAX_LETTERS // 2
    return name if len(name) <= MAX_LETTERS else f"{name[: half - 1]}…{name[-half:]}"
