"""Plots: the right numbers in the right cells, and no overlapping texts."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import sklearn.metrics
from matplotlib.figure import Figure
from matplotlib.image import imread

from lorakeet.tasks.plots import confusion, draw_confusion, draw_loss_curve, most_confused, smoothed


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *rest: Any, **settings: Any) -> Any:
        figures.append(self)
        return save(self, *rest, **settings)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def texts_of(figure: Figure) -> list[Any]:
    axes = figure.axes[0]
    ticks = []
    for axis, at in ((axes.xaxis, 0), (axes.yaxis, 1)):
        low, high = sorted(axis.get_view_interval())  # labels beyond are kept, but not drawn
        ticks += [text for text in axis.get_ticklabels() if low <= text.get_position()[at] <= high]
    return [
        text for text in [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label, *ticks] if text.get_text()
    ]


def assert_readable(figure: Figure) -> None:
    """Assert that no two texts overlap and none exceeds the edge."""
    canvas = figure.canvas
    canvas.draw()  # type: ignore[no-untyped-call]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    width, height = canvas.get_width_height()
    for name, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, name
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one, other)


def labels_and_guesses(classes: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, count)
    return labels, np.where(rng.random(count) < 0.8, labels, rng.integers(0, classes, count))


def test_confusion_is_counted_as_scikit_learn_does() -> None:
    labels, guesses = labels_and_guesses(7, 400)
    expected = sklearn.metrics.confusion_matrix(labels, guesses)
    assert (confusion(labels, guesses, 7) == expected).all()
    tags = np.concatenate([labels, [-100, -100]]).reshape(2, -1)
    assert (confusion(tags, np.concatenate([guesses, [3, -100]]).reshape(2, -1), 7) == expected).all()


def test_the_classes_with_most_errors_are_kept() -> None:
    counts = np.array([[9, 0, 0, 1], [0, 5, 0, 0], [0, 0, 7, 4], [0, 0, 2, 3]])
    merged, names = most_confused(counts, list("abcd"), 2)
    assert names == ["c", "d", "2 others"]
    assert merged.tolist() == [[7, 4, 0], [2, 3, 0], [0, 1, 14]]


@pytest.mark.parametrize("classes", [2, 5, 9, 16, 30])
def test_a_confusion_matrix(tmp_path: Path, drawn: list[Figure], classes: int) -> None:
    labels, guesses = labels_and_guesses(classes, 60 * classes)
    names = [f"class {number}" + " of many words" * (number == 1) for number in range(classes)]
    draw_confusion(labels, guesses, names, tmp_path / "new" / "confusion.png", "Classes of texts")
    assert_readable(drawn[0])
    axes = drawn[0].axes[0]
    counts = sklearn.metrics.confusion_matrix(labels, guesses)
    cells = {tuple(map(int, text.get_position())): text.get_text().split("\n")[0] for text in axes.texts[:-1]}
    expected = {(column, row): f"{counts[row, column]:,}" for row, column in zip(*counts.nonzero(), strict=True)}
    assert cells == expected
    shares = counts / counts.sum(1, keepdims=True)
    assert np.allclose(axes.images[0].get_array(), shares)
    accuracy = sklearn.metrics.accuracy_score(labels, guesses)
    assert [text.get_text() for text in texts_of(drawn[0]) if "accuracy" in text.get_text()] == [
        f"accuracy {accuracy:.1%} of {60 * classes:,}"
    ]
    assert axes.get_ylabel() == "true" and axes.get_xlabel() == "predicted"
    assert imread(tmp_path / "new" / "confusion.png").ndim == 3


def test_many_classes_stay_readable(tmp_path: Path, drawn: list[Figure]) -> None:
    labels, guesses = labels_and_guesses(90, 4000)
    draw_confusion(labels, guesses, [f"c{n}" for n in range(90)], tmp_path / "c.png", max_classes=20)
    assert_readable(drawn[0])
    assert len(drawn[0].axes[0].get_yticklabels()) == 21
    assert drawn[0].axes[0].get_yticklabels()[-1].get_text() == "70 others"


# ---- loss curve -----------------------------------------------------------------------------------------------------


def test_the_moving_average_has_no_bias_at_its_start():
    assert smoothed([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)
    assert smoothed([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.5 * 0.5 * 1 + 0.5 * 3) / 0.75])


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": 2.0}], [{"step": 0, "eval_loss": 3.0}]])
def test_the_loss_curve_is_drawn_from_any_lines(lines, tmp_path):
    path = tmp_path / "curve.png"
    draw_loss_curve(lines, path, "title")
    assert matplotlib.image.imread(path).shape == (540, 960, 4)


def test_the_loss_curve_shows_both_curves(tmp_path):
    lines = [{"step": i, "loss": 4 - i / 50} for i in range(1, 101)]
    draw_loss_curve([*lines, {"step": 0, "eval_loss": 4.0}, {"step": 100, "eval_loss": 2.1}], tmp_path / "curve.png")
    pixels = matplotlib.image.imread(tmp_path / "curve.png")[..., :3]
    for color in ("#08519c", "#d94801"):
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - wanted).max(-1) < 0.02).sum() > 100, color
