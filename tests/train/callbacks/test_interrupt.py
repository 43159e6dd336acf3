"""The command that resumes a run is one that its number of processes accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.train.callbacks.interrupt import resume_command


@pytest.mark.parametrize(
    ("processes", "here", "command"),
    [
        (None, None, "lorakeet train run/run.yaml --resume"),
        ("1", "1", "lorakeet train run/run.yaml --resume"),
        ("2", "2", "torchrun --nproc-per-node 2 -m lorakeet train run/run.yaml --resume"),
        ("8", "4", "torchrun --nnodes 2 --nproc-per-node 4 -m lorakeet train run/run.yaml --resume"),
    ],
)
def test_the_command_has_as_many_processes(
    processes: str | None, here: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", here)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert resume_command(Path("run/run.yaml")) == command
