"""Several sources in given shares: ``data.weights``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorakeet.config import DataSettings
from lorakeet.errors import DataError


def shares(settings: DataSettings) -> list[float] | None:
    """Return ``data.weights`` as shares that sum to one, one for each path; None where there are none.

    Raises:
        DataError: there is not one weight for each path.
    """
    weights = settings.weights
    if weights is None:
        return None
    paths = settings.path if isinstance(settings.path, list) else [settings.path]
    if len(weights) != len(paths):
        raise DataError(
            f"data.weights holds {len(weights)}, data.path {len(paths)}; expected one weight for each path",
            "a folder or a pattern counts as one path",
        )
    return [weight / sum(weights) for weight in weights]


def draw(counts: Sequence[int], parts: Sequence[float], seed: int, limit: int | None = None) -> list[np.ndarray]:
    """Draw the rows to take of each source, by number: as many as keep the shares, until the first is exhausted.

    Args:
        counts: rows of each source.
        parts: share of each source; they sum to one.
        seed: chooses the rows; no row is drawn twice.
        limit: rows to draw at most, of all sources together.
    """
    total = min(count / share for count, share in zip(counts, parts, strict=True))
    total = total if limit is None else min(total, limit)
    # 1e-9: 0.3 · (30 / 0.3) must not be 29.999…
    taken = [int(total * share + 1e-9) for share in parts]
    return [
        np.random.default_rng([seed, number]).permutation(count)[:take]
        for number, (count, take) in enumerate(zip(counts, taken, strict=True))
    ]


def interleave(drawn: Sequence[np.ndarray], counts: Sequence[int], seed: int) -> list[int]:
    """Return the rows of :func:`draw` in random order, numbered as if the sources followed each other."""
    starts = np.cumsum([0, *counts[:-1]])
    rows = np.concatenate([start + numbers for start, numbers in zip(starts, drawn, strict=True)])
    return np.random.default_rng([seed, len(counts)]).permutation(rows).tolist()
