"""A process that is killed under torchrun: all start again, go on from the last checkpoint, and end with the same adapter."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.processes import settings

pytestmark = pytest.mark.slow

WEIGHTS = "adapter/adapter_model.safetensors"
#: Seconds after which a training that hangs is ended.
LONG = 300

RUN = """
import os, signal, sys
from pathlib import Path
from lorakeet.config import read_run
from lorakeet.train import run
steps = [int(step) for step in sys.argv[3:]]
class Progress(run.ProgressCallback):
    def on_step_begin(self, args, state, control, **_):
        log = Path(sys.argv[2])
        kills = log.read_text() if log.exists() else ""
        if os.environ["RANK"] == "1" and state.global_step in steps[kills.count("\\n"):][:1]:
            log.write_text(f"{kills}killed after step {state.global_step}\\n")
            os.kill(os.getpid(), signal.SIGKILL)
run.ProgressCallback = Progress
run.run_training(read_run(sys.argv[1]))
"""


def agents(folder: Path, number: int, *words: str) -> None:
    """Train with two processes under one torchrun, or under two that meet on this machine; all end without an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "train.py").write_text(RUN)
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    nodes = ["--standalone", "--nproc-per-node=2"] if number == 1 else ["--nnodes=2", "--nproc-per-node=1", *meet]
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, "--max-restarts=3", "--monitor-interval=0.1"]
    told = [folder / f"agent-{index}.txt" for index in range(number)]
    started = []
    for file in told:
        with file.open("w") as into:
            started.append(
                subprocess.Popen(
                    [*command, str(folder / "train.py"), *words],
                    stdout=into,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
    try:
        ends = [process.wait(LONG) for process in started]
    finally:
        for process in started:
            process.kill()
    assert ends == [0] * number, told[0].read_text()[-3000:] + told[-1].read_text()[-3000:]


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_process_ends_in_the_same_adapter(tmp_path: Path, number: int) -> None:
    whole, parts = (settings(tmp_path, name, save_every=2, steps=8) for name in ("whole", "parts"))
    log = tmp_path / "kills.txt"
    agents(tmp_path, number, str(whole), str(log))
    assert not log.exists()
    agents(tmp_path, number, str(parts), str(log), "5", "7")
    assert log.read_text() == "killed after step 5\nkilled after step 7\n"
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
