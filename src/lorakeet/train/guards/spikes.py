"""Detection of spikes: a loss or gradient norm far above those of the steps before.

Losses and norms of small batches vary by factors, so their logarithms are compared. A value is a spike if it is both

- more than :data:`DEVIATIONS` robust standard deviations above the median of the last :data:`WINDOW` steps. Such a
  deviation is 1.4826 times the median absolute deviation (Hampel 1974), and at least :data:`LEAST_DEVIATION`;
- more than :data:`ABOVE_LARGEST` times their largest value.

The first condition alone would stop heavy-tailed but healthy runs; the second alone those of nearly constant losses.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Steps. The last ones that a value is compared with.
WINDOW = 128
#: Steps. With fewer there is no spike: losses fall fast at first.
ENOUGH = 32
#: Robust standard deviations of the logarithm above the median.
DEVIATIONS = 8.0
#: Smallest standard deviation of the logarithm: 0.1 is 10 % of the value.
LEAST_DEVIATION = 0.1
#: Multiple of the largest value of the window.
ABOVE_LARGEST = 2.0


@dataclass(frozen=True)
class Spike:
    """A figure far above those of the steps before.

    Attributes:
        name: Of the figure.
        comparison: The value beside the median, in a phrase.
    """

    name: str
    comparison: str


class SpikeDetector:
    """Histories of the figures of a training, and the comparison of a new step with them.

    It is the same in all processes, since they are given the same figures.
    """

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = {}

    def find(self, figures: Mapping[str, float]) -> Spike | None:
        """Return the first figure that is a spike; None if none is.

        Args:
            figures: Figures of a step by name, such as its loss.
        """
        for name, value in figures.items():
            history = self._values.get(name, ())
            limit = spike_limit(history)
            if limit is not None and value > limit:
                median = statistics.median(history)
                return Spike(name, f"{value:.4g}, where the median of the last {len(history)} steps is {median:.4g}")
        return None

    def add(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a step that was applied; zero and values that are not finite tell nothing."""
        for name, value in figures.items():
            if 0 < value < math.inf:
                self._values.setdefault(name, deque(maxlen=WINDOW)).append(value)

    def state(self) -> dict[str, list[float]]:
        """Return the histories for a checkpoint."""
        return {name: list(values) for name, values in self._values.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restore the histories of a checkpoint."""
        self._values = {name: deque(map(float, values), maxlen=WINDOW) for name, values in state.items()}


def spike_limit(history: Sequence[float]) -> float | None:
    """Return the value above which the next one is a spike; None while the history is too short.

    Args:
        history: Positive values of the last steps.
    """
    if len(history) < ENOUGH:
        return None
    logs = [math.log(value) for value in history]
    median = statistics.median(logs)
    deviation = 1.4826 * statistics.median(abs(each - median) for each in logs)
    above_median = median + DEVIATIONS * max(deviation, LEAST_DEVIATION)
    return max(math.exp(min(above_median, 700.0)), ABOVE_LARGEST * max(history))
