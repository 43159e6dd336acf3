"""Cost of a pass: peaks and seconds with any choice of checkpointed layers, and the choice of the fewest that fit."""

from __future__ import annotations

import pytest

from lorakeet.plan.pass_cost import Part, PassCost, choose_every, seconds_of
from lorakeet.plan.plan import COMPILER_BYTES, Memory
from lorakeet.train.planning import plan_run

LAYERS, KEPT, INPUT, REST = 12, 100, 10, 50


def cost(layers: int = LAYERS, tokens: int = 40) -> PassCost:
    """Return a pass whose layers keep 100 bytes of which 10 are their input, take 20 more, and 30 in the backward pass."""
    forward = [Part(KEPT, KEPT + 20, 1.0, n, False, INPUT) for n in range(layers)]
    backward = [Part(-KEPT, 30, 2.0, n, True, INPUT) for n in reversed(range(layers))]
    return PassCost(tokens, (Part(REST, REST), *forward, Part(0, 5, 0.5), *backward))


def test_the_peak_is_at_the_end_of_the_forward_pass_or_after_it() -> None:
    assert cost().peak() == REST + LAYERS * KEPT + 30
    assert cost().kept() == REST + LAYERS * KEPT
    assert cost().peak_outside() == REST


def test_a_checkpointed_layer_keeps_its_input_and_runs_again() -> None:
    assert cost().peak(1) == REST + LAYERS * INPUT + KEPT + 30 + 2 * INPUT
    assert cost().peak(12) == REST + INPUT + 11 * KEPT + 30
    assert cost().kept(1) == REST + LAYERS * INPUT
    assert cost().seconds() == LAYERS * 3 + 0.5
    assert cost().seconds(1) == LAYERS * 4 + 0.5
    assert cost().seconds(5) == cost().seconds() + 3


def test_as_few_layers_as_fit_are_checkpointed() -> None:
    assert choose_every(cost(), cost().peak()) is None
    assert choose_every(cost(), cost().peak() - 1) == 12
    assert choose_every(cost(), cost().peak(5)) == 5
    assert choose_every(cost(), cost().peak(3)) == 3
    assert choose_every(cost(), cost().peak(1)) == 1
    assert choose_every(cost(), 1) == 1
    assert choose_every(cost(layers=0), 1) is None


def test_more_tokens_cost_more_but_logits_are_held_in_chunks() -> None:
    grown = cost().grown(3)
    assert (grown.tokens, grown.peak(), grown.seconds()) == (120, 3 * cost().peak(), 3 * cost().seconds())
    assert cost().grown(3, few_logits=True).peak_outside() == cost().peak_outside()
    assert cost().grown(1) == cost()


def test_seconds_lie_on_lines_between_measured_passes() -> None:
    small, large = cost(2, tokens=10), cost(6, tokens=30)
    middle = (small.seconds() + large.seconds()) / 2
    assert seconds_of([10, 20, 30], [large, small]) == pytest.approx(small.seconds() + middle + large.seconds())
    assert seconds_of([40], [large, small]) == pytest.approx(large.seconds() + (large.seconds() - small.seconds()) / 2)
    assert seconds_of([5, 20], [small]) == pytest.approx(2.5 * small.seconds())


@pytest.mark.parametrize(("every", "is_there", "added"), [(1, False, COMPILER_BYTES), (None, False, 0), (1, True, 0)])
def test_checkpointed_layers_need_the_compiler_of_torch(
    every: int | None, is_there: bool, added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_run, "has_compiler", lambda: is_there)
    memory = Memory(10, *(0,) * 9)
    assert plan_run._with_pass(memory, cost(), every).software == 10 + added
    assert plan_run._with_pass(Memory(0, *(0,) * 9), cost(), every).software == 0  # a GPU
