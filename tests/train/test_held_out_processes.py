"""Held-out figures do not depend on the number of processes, for every task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from helpers.processes import launch
from helpers.task_runs import run_of
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.train.evaluate import all_batches

#: Base and settings of a run by its rows. Batches of 8 leave a rest of the 36 held-out rows.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("llama", {}),
    "SEQ_CLS": ("bert", {}),
    "regression": ("bert", {"task__type": "SEQ_CLS"}),
    "TOKEN_CLS": ("bert", {}),
    "masked": ("bert", {"task__type": "MASKED_LM"}),
    "QUESTION_ANS": ("bert", {}),
    "FEATURE_EXTRACTION": ("bert", {}),
    "SEQ_2_SEQ_LM": ("t5", {}),
}
SCRIPT = """
import sys
from lorakeet.config import read_run
from lorakeet.train.run import run_training
for file in sys.argv[1:]:
    run_training(read_run(file))
"""


def test_the_batches_of_all_processes_are_those_of_one() -> None:
    batches = BatchSampler(SequentialSampler(range(11)), batch_size=4, drop_last=False)
    for rank in (0, 1):
        loader = DataLoader(range(11), batch_sampler=BatchSamplerShard(batches, 2, rank), collate_fn=list)
        assert list(all_batches(loader, 4, processes=2)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
        assert all_batches(loader, 4, processes=1) is loader


def figures_of(folder: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Train for every task, and return the first held-out figures; those of both files must agree."""
    files = []
    for rows, (kind, changes) in RUNS.items():
        (folder / rows).mkdir(parents=True)
        steps = {"train__steps": 1, "train__batch_size": 8, "train__grad_accum": 1}
        config = run_of(folder / rows, kind, rows, **steps, **changes)
        files.append(folder / f"{rows}.yaml")
        files[-1].write_text(config.to_yaml(), encoding="utf-8")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    done = launch(script, *map(str, files), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for rows in RUNS:
        summary = json.loads((folder / rows / "run" / "summary.json").read_text())
        measured = [line for line in read_metrics(folder / rows / "run" / "metrics.jsonl") if "eval_loss" in line]
        for line, part in ((measured[0], "before"), (measured[-1], "after")):
            assert {name: line[f"eval_{name}"] for name in summary[part]} == summary[part]
        after = summary["after"]
        assert summary["eval_tokens"] == after.get("tokens", after.get("targets"))
        found[rows] = summary["before"]
    return found


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    one, two = (figures_of(tmp_path / str(processes), processes) for processes in (1, 2))
    assert one["SEQ_CLS"]["targets"] == 36
    assert two == one  # to the last digit
