"""Detection of spikes: a loss or gradient norm far above those of the steps before.

Losses and norms of small batches vary by factors, so their logarithms are compared. A value is a spike if it is both

- more than :data:`DEVIATIONS` robust standard deviations above the median of the last :data:`WINDOW` steps;
- more than :data:`ABOVE_LARGEST` times their largest value, for a gradient norm :data:`NORM_ABOVE_LARGEST` times: clipping
  bounds what a single gradient does.

The robust standard deviation is 1.4826 times the median absolute deviation (Hampel 1974), at least
:data:`LEAST_DEVIATION`.

The first condition alone would stop heavy-tailed but healthy runs; the second alone those of nearly constant losses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

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
#: The same for a gradient norm. In a healthy run at rank 64 one step in warm-up had 2.5 times the largest norm so far.
NORM_ABOVE_LARGEST = 5.0


@dataclass(frozen=True)
class Spike:
    """A figure far above those of the steps before.

    Attributes:
        name: Of the figure.
        comparison: The value beside the median, in a phrase.
    """

    name: str
    comparison: str


class SpikeDetector(TrainerCallback, ExportableState):
    """Histories of the figures of a training, and the comparison of a new step with them.

    It is the same in all processes, since they are given the same figures. It is a callback so that a checkpoint holds
    it.

    Attributes:
        history: The last figures, by name.
    """

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}

    def find(self, figures: Mapping[str, float]) -> Spike | None:
        """Return the first figure that is a spike; None if none is.

        Args:
            figures: Figures of a step by name, such as its loss.
        """
        for name, value in figures.items():
            history = self.history.get(name, [])
            limit = spike_limit(history, NORM_ABOVE_LARGEST if name == "gradient norm" else ABOVE_LARGEST)
            if limit is not None and value > limit:
                median = statistics.median(history)
                return Spike(name, f"{value:.4g}, where the median of the last {len(history)} steps is {median:.4g}")
        return None

    def add(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a step that was applied; zero and values that are not finite tell nothing."""
        for name, value in figures.items():
            if 0 < value < math.inf:
                self.history[name] = [*self.history.get(name, [])[1 - WINDOW :], value]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.global_step:  # another training of the same Trainer
            self.history = {}

    def state(self) -> dict[str, Any]:
        """Return the histories for a checkpoint."""
        return {"args": {}, "attributes": {"history": self.history}}


def spike_limit(history: Sequence[float], multiple: float = ABOVE_LARGEST) -> float | None:
    """Return the value above which the next one is a spike; None while the history is too short.

    Args:
        history: Positive values of the last steps.
        multiple: Multiple of their largest value that a spike is above.
    """
    if len(history) < ENOUGH:
        return None
    logs = [math.log(value) for value in history]
    median = statistics.median(logs)
    deviation = 1.4826 * statistics.median(abs(each - median) for each in logs)
    above_median = median + DEVIATIONS * max(deviation, LEAST_DEVIATION)
    return max(math.exp(min(above_median, 700.0)), multiple * max(history))
