"""A disk that is full, limited or read-only, or a folder that is removed: one error or none, and the run goes on later."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from torture.disks import FAULTS, Disks
from torture.failing_disk import can_mount

pytestmark = pytest.mark.skipif(not can_mount(), reason="this process may not mount file systems")


@pytest.fixture
def disks(few_steps, tmp_path: Path) -> Disks:
    killer = few_steps(32)
    made = Disks(killer.run, tmp_path, random.Random(0), killer.expected)
    made.operations["run"] = killer.length.operations
    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fails_in_the_middle_of_the_run(fault: str, disks: Disks) -> None:
    trial = disks.trial(fault, "run", disks.operations["run"] // 2)
    assert not trial.faults


@pytest.mark.slow
def test_a_full_cache_changes_no_bit(disks: Disks) -> None:
    assert not disks.trial("full", "cache", 1).faults


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_forty_disks_that_fail(bits: int, whole_run) -> None:
    killer = whole_run(bits)
    disks = Disks(killer.run, killer.folder, killer.chance, killer.expected)
    assert not [(trial, fault) for _ in range(40) for trial in [disks.trial()] for fault in trial.faults]
