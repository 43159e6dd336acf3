"""Other tasks and data in two processes: the curve of one process with the same samples in each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.processes import in_processes, settings
from helpers.task_runs import run_of
from lorakeet.config import AdaLoraConfig, RunConfig, read_run
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.train.run import run_training

pytestmark = pytest.mark.slow

#: Figures that are compared.
KEYS = ("loss", "eval_loss", "grad_norm", "accuracy")


def classification(folder: Path) -> RunConfig:
    """A classifier with a new head."""
    steps = {"train__steps": 6, "train__batch_size": 4, "train__grad_accum": 2, "train__eval_every": 3}
    return run_of(folder, "bert", "SEQ_CLS", **steps, lora__lora_dropout=0.0)


def stream(folder: Path) -> RunConfig:
    """A language model on a stream."""
    config = read_run(settings(folder, "run"))
    data = config.data.model_copy(update={"stream": True, "shuffle_buffer": 16})
    return config.model_copy(update={"data": data})


def adaptive(folder: Path) -> RunConfig:
    """AdaLoRA, whose ranks fall in the last steps."""
    config = read_run(settings(folder, "run"))
    lora = config.lora.model_copy(update={"adalora_config": AdaLoraConfig(init_r=4, target_r=2), "lora_dropout": 0.0})
    return config.model_copy(update={"lora": lora})


def train(config: RunConfig) -> dict[str, Any]:
    return run_training(config)


@pytest.mark.parametrize("make", [classification, stream, adaptive])
def test_two_processes_have_the_curve_of_one(tmp_path: Path, make: Any) -> None:
    config = make(tmp_path)
    curves = []
    for processes in (1, 2):
        accumulated = config.train.grad_accum // processes
        chosen = config.model_copy(
            update={
                "train": config.train.model_copy(update={"grad_accum": accumulated}),
                "out": str(tmp_path / f"run{processes}"),
            }
        )
        for outcome in in_processes(train, chosen, processes=processes, seconds=200):
            assert outcome.error is None, outcome
        lines = read_metrics(tmp_path / f"run{processes}" / "metrics.jsonl")
        curves.append([(line["step"], key, line[key]) for line in lines for key in KEYS if key in line])
    one, two = curves
    assert [place[:2] for place in one] == [place[:2] for place in two] and len(one) > 12
    for ours, theirs in zip(one, two, strict=True):
        assert theirs[2] == pytest.approx(ours[2], rel=1e-5, abs=1e-5), (ours, theirs)
