"""Two runs never write to one folder at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorakeet.errors import OutputError
from lorakeet.runs.folder_lock import NAME, check_unlocked, locked

HOLD = """
import sys, time
from lorakeet.runs.folder_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path: Path, holder: subprocess.Popen) -> None:
    for refused in (lambda: check_unlocked(tmp_path), lambda: locked(tmp_path).__enter__()):
        with pytest.raises(OutputError, match=f"in use by another run, process {holder.pid} on {os.uname().nodename}"):
            refused()
    assert (tmp_path / NAME).exists()  # the refused run removes no file of the one that trains


def test_a_killed_run_leaves_no_lock_behind(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / NAME).exists()
    check_unlocked(tmp_path)
    with locked(tmp_path):
        pass
    assert not (tmp_path / NAME).exists()


def test_a_process_does_not_hold_a_folder_twice(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OutputError, match="in use"):
        locked(tmp_path / ".." / tmp_path.name).__enter__()
    check_unlocked(tmp_path)


def test_a_check_creates_nothing(tmp_path: Path) -> None:
    check_unlocked(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("lorakeet.runs.folder_lock.fcntl.lockf", refuse)
    with locked(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
