"""A run that is killed and started again equals the uninterrupted one: adapter and metrics, for every task and base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.task_runs import run_of
from helpers.tiny_tasks import FILLERS
from lorakeet.config import RunConfig, make_run
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.train import run as module
from lorakeet.train.callbacks.progress import ProgressCallback
from lorakeet.train.run import run_training

#: Fields of metrics.jsonl that are measured by the clock.
CLOCK = ("seconds", "tokens_per_second")


class Killed(BaseException):
    """Stands for a killed process: no handler may clean up after it."""


def killed_at(step: int) -> type[ProgressCallback]:
    """Return a progress callback that kills the run inside of a step, after its first micro-batch if it has several."""

    class Kill(ProgressCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                raise Killed

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.on_substep_end(args, state, control)

    return Kill


def result(folder: str) -> tuple[bytes, list[str], set[str]]:
    metrics = read_metrics(Path(folder) / "metrics.jsonl")
    lines = [json.dumps({k: v for k, v in line.items() if k not in CLOCK}) for line in metrics]
    weights = (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()
    return weights, lines, {path.name for path in Path(folder).iterdir()}


def moved(config: RunConfig, name: str) -> RunConfig:
    return config.model_copy(update={"out": f"{config.out}-{name}"})


@pytest.fixture
def same_when_killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def check(config: RunConfig, *steps: int) -> None:
        whole, parts = moved(config, "whole"), moved(config, "parts")
        run_training(whole)
        for step in steps:
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(module, "ProgressCallback", killed_at(step))
                run_training(parts)
        run_training(parts)
        for one, other in zip(result(whole.out), result(parts.out), strict=True):
            assert one == other

    return check


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"base__bits": 8, "train__save_every": 2, "train__log_every": 3}, id="8 bits"),
        pytest.param(
            {"train__save_every": 2, "train__eval_every": 1, "train__load_best": True, "train__lr": 0.5},
            id="load best",
            marks=pytest.mark.slow,
        ),
        pytest.param({"train__save_every": 1, "train__steps": 9}, id="every step", marks=pytest.mark.slow),
        pytest.param(
            {"train__save_minutes": 0, "train__eval_every": 2, "train__keep_best": True, "train__keep_checkpoints": 1},
            id="keep best",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"train__padding_free": False, "train__fused_loss": False, "train__save_every": 3},
            id="slow paths",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_language_model(changes: dict[str, Any], settings: Callable[..., RunConfig], same_when_killed) -> None:
    same_when_killed(settings(lora__lora_dropout=0.3, **changes), 2, 4, 6)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("bert", "SEQ_CLS"),
        *(
            pytest.param(kind, rows, marks=pytest.mark.slow)
            for kind, rows in (
                ("bert", "multi_label"),
                ("bert", "regression"),
                ("bert", "TOKEN_CLS"),
                ("bert", "QUESTION_ANS"),
                ("bert", "FEATURE_EXTRACTION"),
                ("bert", "MASKED_LM"),
                ("t5", "SEQ_2_SEQ_LM"),
            )
        ),
    ],
)
def test_every_task(kind: str, rows: str, tmp_path: Path, same_when_killed) -> None:
    task = {"task__type": rows} if rows == "MASKED_LM" else {}
    train = {"train__steps": 4, "train__save_every": 1, "train__eval_every": 2, "train__grad_accum": 2}
    same_when_killed(run_of(tmp_path, kind, rows, **train, **task, lora__lora_dropout=0.2), 3)


def test_a_stream(tmp_path: Path, settings: Callable[..., RunConfig], same_when_killed) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join([str(n), *FILLERS[n % 7 :]])}) + "\n" for n in range(90)))
    stream = {"path": str(data), "stream": True, "shuffle_buffer": 20, "max_length": 16, "eval_fraction": 0.1}
    tree = settings(train__save_every=2).model_dump()
    same_when_killed(make_run({**tree, "data": stream}), 4, 6)
