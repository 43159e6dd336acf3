"""Pace: pieces of prompts at most double a step, on machines of several kinds; one slow step changes little."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.engine import pace as module
from lorakeet.serve.engine.forward import Piece
from lorakeet.serve.engine.pace import Load, Pace, load_of
from lorakeet.serve.engine.residents import Resident

Cost = Callable[[Sequence[tuple[int, int]]], float]


def smooth(rows: Sequence[tuple[int, int]]) -> float:
    """Return the seconds of a step, as on a machine bound by memory at first; of (stored, new) tokens of each row."""
    return 9e-3 + 1e-3 * sum(new for _, new in rows)


def attending(rows: Sequence[tuple[int, int]]) -> float:
    return smooth(rows) + 5e-6 * sum(load_of(*row).attended for row in rows)


def jumping(rows: Sequence[tuple[int, int]]) -> float:
    """Return more from 33 tokens on, where other loops begin."""
    tokens = sum(new for _, new in rows)
    return 9e-3 + 0.5e-3 * tokens + (20e-3 if tokens > 32 else 0.0)


def apart(rows: Sequence[tuple[int, int]]) -> float:
    """Return the seconds of passes of their own for pieces of more than one token."""
    single = [row for row in rows if row[1] == 1]
    return sum(smooth([row]) for row in rows if row[1] > 1) + (smooth(single) if single else 0.0)


class Machine:
    """A forward pass that takes time by a clock of its own.

    Attributes:
        pages: A pool.
        now: The clock, in seconds.
    """

    def __init__(self, cost: Cost) -> None:
        self.pages: Pages | None = Pages(1, 100, 1, 32, 4)
        self.cost, self.now = cost, 0.0

    def get_ready(self, adapter: Resident) -> None:
        """Do nothing."""

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        self.now += self.cost([(piece.sequence.length, len(piece.ids)) for piece in pieces])
        return torch.zeros(len(pieces), 2)


def measured(cost: Cost, monkeypatch: pytest.MonkeyPatch) -> Pace:
    machine, pace = Machine(cost), Pace()
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: machine.now)
        pace.measure(machine, None)
    assert machine.pages is not None and machine.pages.free == len(machine.pages)
    return pace


def answers(rows: int, position: int = 100) -> Load:
    return sum((load_of(position, 1) for _ in range(rows)), Load())


@pytest.mark.parametrize("position", [0, 500, 3000])
@pytest.mark.parametrize("rows", [1, 4, 8, 15])
@pytest.mark.parametrize("cost", [smooth, attending, jumping])
def test_piece_doubles_a_step(cost: Cost, rows: int, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = measured(cost, monkeypatch)
    tokens = pace.fitting(answers(rows), Load(), position, 128)
    others = [(100, 1)] * rows
    alone, both, more = (cost([*others, *piece]) for piece in ([], [(position, tokens)], [(position, 2 * tokens)]))
    assert tokens == 1 or both <= 2.2 * alone
    assert tokens >= 1 and more > 1.6 * alone  # the room is used


def test_piece_in_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = measured(apart, monkeypatch)
    tokens = pace.fitting(answers(1), Load(), 0, 128)
    assert 3 <= tokens <= 6
    assert pace.fitting(answers(1), load_of(0, tokens), 0, 128) == 0  # and no second one


def test_room_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = measured(smooth, monkeypatch)
    whole = pace.fitting(answers(4), Load(), 0, 128)
    first = load_of(0, whole - 3)
    assert pace.fitting(answers(4), first, 0, 128) == 3
    assert pace.fitting(answers(4), first + load_of(0, 3), 0, 128) == 0


def test_slow_machine_and_slow_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = measured(smooth, monkeypatch)
    before = pace.fitting(answers(1), Load(), 0, 128)
    for _ in range(30):
        pace.note(answers(1), Load(), 2 * smooth([(100, 1)]))
    assert pace.slowness == pytest.approx(2, rel=0.05)
    assert pace.fitting(answers(1), Load(), 0, 128) == before
    pace.note(answers(1), load_of(0, before), 100.0)
    assert pace.fitting(answers(1), Load(), 0, 128) >= 0.85 * before


def test_dear_tokens_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of an adapter that costs half more are cut shorter after a while."""
    pace = measured(smooth, monkeypatch)
    for _ in range(100):
        pace.note(answers(2), Load(), smooth([(100, 1)] * 2))
        tokens = pace.fitting(answers(2), Load(), 0, 128)
        pace.note(answers(2), load_of(0, tokens), smooth([(100, 1)] * 2) + 1.5e-3 * tokens)
    assert tokens == pytest.approx(smooth([(100, 1)] * 2) / 1.5e-3, abs=1.5)


def test_nothing_measured() -> None:
    assert Pace().fitting(answers(1), Load(), 0, 50) == 50
