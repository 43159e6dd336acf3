"""The rule for spikes: no false alarm in noisy runs, and no real spike that is missed."""

from __future__ import annotations

import math
import random

import pytest

from lorakeet.train.guards.spikes import ENOUGH, WINDOW, SpikeDetector, spike_limit


def noisy(steps: int, deviation: float, seed: int = 0) -> list[float]:
    """Draw log-normal values, as the losses of small batches are; in a real run the deviation was 0.3 for one sample."""
    generator = random.Random(seed)
    return [3.0 * math.exp(generator.gauss(0.0, deviation)) for _ in range(steps)]


@pytest.mark.parametrize("deviation", [0.01, 0.1, 0.3, 1.0])
def test_a_noisy_run_has_no_false_alarm(deviation: float) -> None:
    values = noisy(5000, deviation)
    limits = [spike_limit(values[max(0, i - WINDOW) : i]) for i in range(len(values))]
    assert not any(limit is not None and value > limit for value, limit in zip(values, limits, strict=True))


@pytest.mark.parametrize(("deviation", "factor"), [(0.01, 2.3), (0.1, 2.8), (0.3, 13.0)])
def test_a_spike_is_found(deviation: float, factor: float) -> None:
    limit = spike_limit(noisy(WINDOW, deviation))
    assert limit is not None and 3.0 * factor > limit


def test_a_loss_that_falls_fast_or_begins_has_no_spikes() -> None:
    assert spike_limit([1.0] * (ENOUGH - 1)) is None and spike_limit([1.0] * ENOUGH) is not None
    falling = [8.0 * 0.9**i for i in range(100)]
    limit = spike_limit(falling)
    assert limit is not None and falling[0] < limit


def test_both_conditions_hold() -> None:
    heavy = [1.0] * 100 + [10.0]  # one large value is part of this run
    assert spike_limit(heavy) == 20.0
    wide = noisy(WINDOW, 1.0)
    limit = spike_limit(wide)
    assert limit is not None and limit > 10 * max(wide)


def test_zero_and_values_that_are_not_finite_are_not_kept() -> None:
    detector = SpikeDetector()
    for value in (0.0, -1.0, math.nan, math.inf, *[2.0] * 300):
        detector.add({"loss": value})
    assert detector.history == {"loss": [2.0] * WINDOW}
    assert detector.find({"loss": 4.0}) is None
    found = detector.find({"loss": 5.5, "gradient norm": 1e9})
    assert found is not None and found.comparison == "5.5, where the median of the last 128 steps is 2"


def test_a_clipped_gradient_alone_is_one_only_if_it_is_far_above_the_others() -> None:
    """The norms are those of a healthy run at rank 64, in warm-up."""
    detector = SpikeDetector()
    for value in (0.9,) * 42 + (3.0,) + (0.8,) * 5:
        detector.add({"loss": value, "gradient norm": value})
    assert detector.find({"loss": 0.9, "gradient norm": 7.46}) is None
    assert detector.find({"loss": 7.46, "gradient norm": 0.9}) is not None
    found = detector.find({"loss": 0.9, "gradient norm": 16.0})
    assert found is not None and found.name == "gradient norm"
