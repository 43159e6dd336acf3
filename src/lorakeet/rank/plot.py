"""Picture of an adapter's ranks: a heat map over the layers, and the singular values of each kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorakeet.rank.layer_map import draw_layer_map, kinds_and_numbers
from lorakeet.tasks.plots import BLUES, COLORS, new_figure, save_figure


def draw_ranks(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw the rank that each layer needs, and the falling singular values of each kind of layer, as a PNG.

    Args:
        report: The result of :func:`lorakeet.rank.report.rank_report`.
        path: Path of the PNG.
    """
    layers = report["layers"]
    kinds, numbers = kinds_and_numbers(layers)
    figure = new_figure(max(7.0, 0.28 * len(numbers) + 3), 1.2 + 0.42 * len(kinds) + 3.6)
    heat, curves = figure.subplots(2, 1, height_ratios=[0.6 + 0.42 * len(kinds), 3])
    largest = max(layer["r"] for layer in layers)
    image = draw_layer_map(heat, layers, "rank_needed", BLUES, (0, largest))
    heat.set_xlabel("layer")
    figure.colorbar(image, ax=heat, shrink=0.9, pad=0.02, label=f"rank, of {largest}")
    for kind, color in zip(kinds, COLORS * len(kinds), strict=False):
        _draw_spectra(curves, [layer for layer in layers if layer["kind"] == kind], kind, color)
    curves.set_yscale("log")
    curves.set_xlabel("number of the singular value")
    curves.set_ylabel("σ / largest σ of the layer")
    curves.grid(alpha=0.25)
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False, ncols=2)
    note = f"rank that keeps {report['energy']:.4g} of each layer's energy ‖ΔW‖²"
    save_figure(figure, heat, path, "Ranks", note)


def _draw_spectra(axes: Any, layers: list[Any], kind: str, color: str) -> None:
    """Draw the median of the layers' singular values, and the span from the smallest to the largest."""
    learned = [np.array(layer["singular_values"]) for layer in layers if layer["update_norm"]]
    if not learned:
        return
    length = min(map(len, learned))
    curves = np.array([values[:length] / values[0] for values in learned]).clip(1e-8)
    positions = np.arange(1, length + 1)
    axes.plot(positions, np.median(curves, axis=0), color=color, linewidth=2, label=kind, marker="o", markersize=3)
    axes.fill_between(positions, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
