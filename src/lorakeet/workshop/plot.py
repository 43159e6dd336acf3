"""Picture of two adapters compared: heat maps over the layers, of the cosine and of the shared subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakeet.rank.layer_map import draw_layer_map, kinds_and_numbers
from lorakeet.tasks.plots import BLUES, new_figure, save_figure

#: Panels: title, figure of a layer, colors, smallest and largest value.
_PANELS = (
    ("cosine of the updates", "cosine", "RdBu", -1.0, 1.0),
    ("overlap of the column spaces", "column_overlap", BLUES, 0.0, 1.0),
    ("overlap of the row spaces", "row_overlap", BLUES, 0.0, 1.0),
)


def draw_similarity(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw cosine and overlaps, a row for each kind of layer and a column for each layer number, as a PNG.

    Args:
        report: The result of :func:`lorakeet.workshop.similarity.similarity_report`.
        path: Path of the PNG.
    """
    layers = report["layers"]
    kinds, numbers = kinds_and_numbers(layers)
    figure = new_figure(max(7.0, 0.34 * len(numbers) + 3), 1.2 + len(_PANELS) * (1.0 + 0.36 * len(kinds)))
    panels = figure.subplots(len(_PANELS), 1)
    for axes, (title, key, colors, low, high) in zip(panels, _PANELS, strict=True):
        image = draw_layer_map(axes, layers, key, colors, (low, high), digits=2)
        if axes is not panels[0]:
            axes.set_title(title, loc="left", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
    panels[-1].set_xlabel("layer")
    save_figure(figure, panels[0], path, "Similarity of two adapters", _PANELS[0][0])
