"""Two processes (gloo) whose micro-batches share passes train as one process without sharing."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.processes import RUN, launch, settings
from lorakeet.runs.metrics_log import read_metrics

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("budget", [20, 4096])  # of 20 tokens: some steps take more passes than others
def test_two_processes_join_alike(tmp_path: Path, budget: int) -> None:
    """Their samples differ in length, so each alone would plan other passes."""
    script = tmp_path / "train.py"
    script.write_text(RUN)
    told = {}
    for processes, accumulate, tokens in [(1, 8, 0), (2, 4, budget)]:
        file = settings(tmp_path, f"run{processes}", grad_accum=accumulate, token_budget=tokens, steps=3)
        done = launch(script, str(file), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        told[processes] = done.stderr
    assert "passes     " not in told[1]
    assert told[2].count(f"passes     the 4 micro-batches of a step run as one, up to {budget:,} tokens") == 1
    one, two = (read_metrics(tmp_path / f"run{processes}" / "metrics.jsonl") for processes in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, true in zip(two, one, strict=True):
        assert mine.get("tokens") == true.get("tokens")
        for key in {"loss", "eval_loss", "grad_norm"} & true.keys():
            assert mine[key] == pytest.approx(true[key], rel=2e-5), (mine, true)
    x, y = (load_file(tmp_path / f"run{p}" / "adapter" / "adapter_model.safetensors") for p in (1, 2))
    for name, tensor in x.items():
        assert (y[name] - tensor).abs().max() < 1e-4, name
