"""The files for clusters start a run that the command line accepts; Ray runs it where it is installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.processes import settings
from lorakeet.cli.shared.options import typer_command
from lorakeet.cli.train import train

EXAMPLES = Path(__file__).parents[2] / "examples"


def command_of(script: str) -> list[str]:
    """Return the words after ``-m lorakeet train`` of a script, and check that they are all flags of the command."""
    words = re.search(r"-m lorakeet train (.*)", script)
    assert words is not None
    flags = {flag for parameter in typer_command(train).params for flag in parameter.opts}
    found = words[1].partition("||")[0].split()
    assert {word for word in found if word.startswith("--")} <= flags
    return found


def test_the_slurm_script_is_bash_and_starts_a_run() -> None:
    file = EXAMPLES / "slurm" / "train.sbatch"
    assert subprocess.run(["bash", "-n", str(file)], capture_output=True).returncode == 0
    script = file.read_text(encoding="utf-8")
    assert command_of(script) == ['"$run"']
    assert "#SBATCH --requeue" in script and "#SBATCH --signal=TERM@" in script and "--max-restarts 3" in script


def test_the_skypilot_task_starts_a_run_in_its_bucket() -> None:
    task = yaml.safe_load((EXAMPLES / "skypilot" / "train.yaml").read_text(encoding="utf-8"))
    words = command_of(task["run"])
    (mount,) = task["file_mounts"]
    assert words[words.index("--out") + 1].startswith(f"{mount}/") and task["resources"]["use_spot"] is True


def test_the_ray_example_needs_ray_only_to_run() -> None:
    shown = subprocess.run([sys.executable, str(EXAMPLES / "ray_train.py"), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--workers" in shown.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_trains_with_two_workers(tmp_path: Path) -> None:
    file = settings(tmp_path, "run")
    command = [sys.executable, str(EXAMPLES / "ray_train.py"), str(file), "--storage", str(tmp_path / "ray")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "summary.json").exists()
