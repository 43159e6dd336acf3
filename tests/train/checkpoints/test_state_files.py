"""State as safetensors and JSON: what went in comes out, for every optimizer and schedule, and nothing runs."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lorakeet.errors import TrainingError
from lorakeet.rng import random_state, set_random_state
from lorakeet.train.checkpoints.state_files import read_state, write_state


def equal(one: Any, other: Any) -> bool:
    """Whether two states are equal in every type and bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (torch.Tensor, np.ndarray)):
        same = torch.equal if isinstance(one, torch.Tensor) else np.array_equal
        return one.dtype == other.dtype and same(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or (one != one and other != other)


def test_every_container_and_number_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "numbers": [0, -1, 2**70, 0.1, 1e-300, math.inf, -math.inf, math.nan, True, None, "text", ""],
        "tuple": (1, (2.5, "x"), []),
        "keys": {0: "int", "0": "text", (1, 2): "tuple", "$tensor": "no tag"},
        "tensors": [shared, shared, shared[1:3], shared.view(2, 3).T, torch.tensor(3), torch.zeros(0)],
        "formats": [torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.int8, torch.uint8, torch.bool)],
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1), 0: torch.ones(2), "0": torch.zeros(2)},
        "array": np.arange(3, dtype=np.uint32),
    }
    write_state(tmp_path, "state", state)
    assert equal(read_state(tmp_path, "state"), state)
    assert {path.name for path in tmp_path.iterdir()} == {"state.json", "state.safetensors"}


def test_random_states_come_back(tmp_path: Path) -> None:
    before = random_state()
    write_state(tmp_path, "random", before)
    drawn = torch.rand(3), np.random.rand(3)
    set_random_state(read_state(tmp_path, "random"))
    assert equal(random_state(), before)
    assert torch.equal(torch.rand(3), drawn[0]) and np.array_equal(np.random.rand(3), drawn[1])


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
}
SCHEDULES = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
        schedule.step(*[1.0] if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else [])


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [*((name, "LambdaLR") for name in OPTIMIZERS), *(("AdamW", name) for name in SCHEDULES)]
)
def test_optimizer_and_schedule_go_on_as_if_never_written(optimizer: str, schedule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = nn.Linear(4, 3)
    other = nn.Linear(4, 3)
    made = [
        (model, made := OPTIMIZERS[optimizer](model.parameters()), SCHEDULES[schedule](made)) for model in (one, other)
    ]
    steps(*made[0], 2)
    other.load_state_dict(one.state_dict())
    for name, mine, its in (("optimizer", made[0][1], made[1][1]), ("schedule", made[0][2], made[1][2])):
        write_state(tmp_path, name, mine.state_dict())
        its.load_state_dict(read_state(tmp_path, name))
    for triple in made:
        steps(*triple, 3)
    assert torch.equal(one.weight, other.weight) and equal(made[0][1].state_dict(), made[1][1].state_dict())


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, torch.nn.Linear(1, 1), pickle.loads], ids=["object", "set", "module", "function"]
)
def test_what_only_a_pickle_could_hold_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"state\.deep\.0 of the training's state is a \w+, expected numbers"):
        write_state(tmp_path, "state", {"deep": [value]})


@pytest.mark.parametrize(
    "text", ["", "{", '{"$tensor": "none"}', '{"$what": 1}', '{"$dict": [1]}', '{"$dict": [[{}, 1]]}', "[" * 10**5]
)
def test_a_hostile_file_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(TrainingError, match="cannot be read"):
        read_state(tmp_path, "state")


def test_the_files_hold_no_pickle(tmp_path: Path) -> None:
    write_state(tmp_path, "state", random_state())
    json.loads((tmp_path / "state.json").read_text())
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in tmp_path.iterdir())
