"""The waiting of idle threads: the command limits it before torch is there, and leaves the user's choice alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorakeet.kernels.cpu import threads


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": str(threads.SPINS)}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_the_command_limits_it_before_torch_is_imported(said: dict[str, str], expected: dict[str, str]) -> None:
    script = (
        "import os, sys\nfrom lorakeet import cli\n"
        "assert 'torch' not in sys.modules\n"
        "cli.main = lambda: 0\n"
        "try:\n    cli.script()\nexcept SystemExit:\n    pass\n"
        "print({name: os.environ[name] for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY') if name in os.environ})\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in threads.VARIABLES} | said
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == str(expected)


def test_it_is_too_late_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    threads.limit_waiting()
    assert "GOMP_SPINCOUNT" not in os.environ and "GOMP_SPINCOUNT" in threads.waiting()
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert threads.waiting() == "OMP_WAIT_POLICY=passive"
