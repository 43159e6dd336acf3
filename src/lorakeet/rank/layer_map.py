"""Heat map over a model's layers: a row for each kind of layer, a column for each layer number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Share of the largest value from which on a figure is written in white, on a dark color.
_DARK = 0.6


def kinds_and_numbers(layers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[int | None]]:
    """Return the kinds of layers and the layer numbers of a report, sorted; None, for layers without one, comes first."""
    numbers = {layer["layer"] for layer in layers}
    return sorted({layer["kind"] for layer in layers}), sorted(numbers, key=lambda n: -1 if n is None else n)


def draw_layer_map(
    axes: Any, layers: Sequence[Mapping[str, Any]], key: str, colors: Any, span: tuple[float, float], digits: int = 0
) -> Any:
    """Draw one figure of each layer of a report, and write it into its cell.

    Args:
        axes: The axes to draw on.
        layers: Layers with ``kind``, ``layer`` and the figure; of several in one cell the largest figure is drawn.
        key: Name of the figure; None as its value leaves the cell empty.
        colors: The color map.
        span: Smallest and largest value of the color map.
        digits: Decimals of the figures.

    Returns:
        The image, for a color bar.
    """
    kinds, numbers = kinds_and_numbers(layers)
    table = np.full((len(kinds), len(numbers)), np.nan)
    for layer in layers:
        if layer[key] is not None:
            place = kinds.index(layer["kind"]), numbers.index(layer["layer"])
            table[place] = np.nanmax([table[place], layer[key]])
    image = axes.imshow(table, cmap=colors, vmin=span[0], vmax=span[1], aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(table)), strict=True):
        value = table[row, column]
        color = "white" if abs(value) > _DARK * span[1] else "black"
        axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=color, fontsize=7 - digits / 2)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(len(numbers)), ["-" if number is None else str(number) for number in numbers], fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image
