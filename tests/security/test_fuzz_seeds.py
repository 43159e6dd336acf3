"""Inputs that once failed, and a few new ones, give success or an error of Lorakeet; the fuzzer itself runs longer."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

import fuzzing
from fuzz import minimized
from fuzzing.judge import Arena, judge
from fuzzing.mutate import mutate
from fuzzing.targets import Target, targets

SEEDS = sorted((Path(fuzzing.__file__).parent / "seeds").glob("*/*"))
TARGETS = list(targets())


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_kept_inputs(path: Path, arena: Arena) -> None:
    target = next(target for target in TARGETS if target.name == path.parent.name)
    target.examples()  # some make what the target needs beside its input
    assert judge(target.run, path.read_bytes(), arena) is None


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_examples_and_a_few_mutations(target: Target, arena: Arena) -> None:
    examples, rng = target.examples(), random.Random(1)
    mutated = [mutate(rng.choice(examples), rng, links=target.links) for _ in range(15)]
    for data in (*examples, *mutated):
        assert judge(target.run, data, arena) is None


def broken(folder: Path) -> None:
    """Do what the judge must see."""
    name = (folder / "input").read_text()
    if name == "error":
        raise KeyError(name)
    if name == "outside":
        (folder.parent / "outside" / "config.json").read_bytes()
    if name == "write":
        (folder / "x").write_text("x")
    if name == "memory":
        bytearray(1 << 40)
    while name == "hang":
        pass
    if name == "wait":
        time.sleep(60)


@pytest.mark.parametrize("kind", ["error", "outside", "write", "hang", "wait", "memory"])
def test_the_judge_sees(kind: str, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.judge.SECONDS", 0.2)
    monkeypatch.setattr("fuzzing.judge.WAITS", 1 if kind == "wait" else 60)
    finding = judge(broken, kind.encode(), arena)
    assert finding is not None and finding.kind == {"memory": "error", "wait": "hang"}.get(kind, kind)
    assert judge(broken, b"fine", arena) is None


def test_a_finding_is_made_smaller() -> None:
    data = bytes(1000) + b"needle" + bytes(777)
    assert minimized(data, lambda part: b"needle" in part) == b"needle"
