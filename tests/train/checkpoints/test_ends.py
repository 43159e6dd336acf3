"""Ends and interruptions of a training that a resumed one must not get wrong."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from helpers.tiny_training import tiny_data, tiny_peft
from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, OutputError
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.train import run as module
from lorakeet.train.callbacks import save_by_time
from lorakeet.train.callbacks.progress import ProgressCallback
from lorakeet.train.callbacks.save_by_time import SaveByTime
from lorakeet.train.checkpoints import resumable
from lorakeet.train.checkpoints.manifest import checkpoints
from lorakeet.train.run import InterruptedRunError, run_training
from lorakeet.train.trainer import Trainer


@pytest.fixture
def fit(make_args, collator) -> Callable[..., Trainer]:
    def run(resume: Any = None, callbacks: Any = (), **changes: Any) -> Trainer:
        args = make_args(**{"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **changes})
        data = {"train_dataset": tiny_data(27), "eval_dataset": tiny_data(6, seed=9)}
        trainer = Trainer(tiny_peft(), args, data_collator=collator, callbacks=list(callbacks), **data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def weights(trainer: Trainer) -> dict[str, Any]:
    return {name: value.tolist() for name, value in trainer.model.named_parameters() if value.requires_grad}


def test_a_training_that_took_its_last_step_takes_no_other(fit) -> None:
    """The last step is inside an epoch, of four steps here."""
    whole = fit()
    again = fit(resume=True)
    assert again.state.global_step == whole.state.global_step == 6
    assert weights(again) == weights(whole)


def test_a_resumed_run_removes_what_a_killed_one_had_no_time_to(fit, tmp_path: Path) -> None:
    """A kill between the last save and the removal of the checkpoint that it replaces."""
    whole = fit(save_total_limit=1)
    folder = Path(whole.args.output_dir)
    assert list(checkpoints(folder)) == [6]
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-4")
    fit(resume=True, save_total_limit=1)
    assert list(checkpoints(folder)) == [6]
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-8")  # damaged: resuming names another one
    fit(resume=str(folder / "checkpoint-6"), save_total_limit=1)
    assert list(checkpoints(folder)) == [8, 6]


def test_an_early_stop_stays_a_stop(fit) -> None:
    stop = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "metric_for_best_model": "loss",
        "learning_rate": 0.0,
        "max_steps": 12,
    }
    whole = fit(callbacks=[EarlyStoppingCallback(2)], **stop)
    assert 0 < whole.state.global_step < 6
    counter = EarlyStoppingCallback(2)
    assert fit(resume=True, callbacks=[counter], **stop).state.global_step == whole.state.global_step
    assert counter.early_stopping_patience_counter == 2


class SignalIn(ProgressCallback):
    """Progress callback that is interrupted in the first batch of the evaluation after step 2."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_breaks_off_an_evaluation_and_the_resumed_run_makes_up_for_it(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(name: str) -> list[Any]:
        return [
            {k: v for k, v in line.items() if "second" not in k}
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
        ]

    changes = {"train__eval_every": 2, "train__load_best": True, "train__lr": 1.0}
    run_training(settings(out=str(tmp_path / "whole"), **changes))
    config = settings(out=str(tmp_path / "parts"), **changes)
    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError, match="stopped after step 2 of 6"):
        patch.setattr(module, "ProgressCallback", SignalIn)
        run_training(config)
    assert [line["step"] for line in lines("parts")] == [0, 1, 2]
    run_training(config)
    assert lines("parts") == lines("whole")
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()


def test_a_run_that_is_stopped_while_it_measures_its_end_trains_no_more(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()

    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Run, "_measure_end", interrupted)
        run_training(config)
    written = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    steps: list[int] = []
    monkeypatch.setattr(module.Trainer, "training_step", lambda *_, **__: steps.append(1))
    assert run_training(config)["steps"] == 6 and not steps
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == written
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoints_by_time_and_none_if_asked(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    class Watch(ProgressCallback):
        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            saved.append(state.global_step)

    monkeypatch.setattr(module, "ProgressCallback", Watch)
    monkeypatch.setattr(save_by_time, "LARGEST_SHARE", 1e9)
    run_training(settings(train__save_minutes=1e-9, train__steps=3))
    run_training(settings(train__save_minutes=0, train__steps=1, out=str(tmp_path / "never")))
    assert saved == [1, 2, 3]


def test_time_counts_from_the_last_save(monkeypatch: pytest.MonkeyPatch, make_args) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    took: list[float] = []
    callback, args = SaveByTime(1, took), make_args()

    class State:
        global_step, max_steps, is_world_process_zero = 1, 9, True

    def is_due(at: float) -> bool:
        class Control:
            should_save = False

        now[0] = at
        callback.on_step_end(args, State, Control)
        if Control.should_save:
            callback.on_save(args, State, Control)
        return Control.should_save

    callback.on_train_begin(args, State, None)
    assert [at for at in range(0, 200, 10) if is_due(at)] == [60, 120, 180]
    took.append(1.5)  # 1 % of 150 seconds
    assert [at for at in range(200, 500, 10) if is_due(at)] == [330, 480]


def test_the_disk_is_checked_before_each_save(settings, monkeypatch, caplog) -> None:
    def full(folder: Path, need: int) -> None:
        if "checkpoints" in str(folder):
            raise OutputError(f"{folder} has 0.0 MB free, and {need} bytes will be written")

    monkeypatch.setattr(resumable, "check_room", full)
    assert run_training(settings(train__save_every=2))["steps"] == 6
    assert caplog.text.count("has no checkpoint, and the training goes on") == 3


def test_the_best_needs_evaluations(settings) -> None:
    for name in ("keep_best", "load_best"):
        with pytest.raises(ConfigError, match=f"train.{name} compares held-out losses .* train.eval_every is not set"):
            run_training(settings(**{f"train__{name}": True}))


def test_the_adapter_of_the_best_step_is_the_runs_own(settings, tmp_path: Path) -> None:
    summary = run_training(settings(train__eval_every=1, train__load_best=True, train__lr=3.0, train__warmup=0))
    losses = {
        line["step"]: line["eval_loss"]
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "eval_loss" in line
    }
    best = min(range(1, 7), key=lambda step: losses[step])
    assert best < 6 and summary["eval_loss_after"] == losses[best] and summary["best_step"] == best
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{best}").is_dir()


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_stop_of_the_users_own_is_no_end(fit) -> None:
    assert fit(callbacks=[Stop()]).state.global_step == 2
    assert fit(resume=True).state.global_step == 6
