"""Processes that would not train the same are an error in all of them, before the first step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from helpers.processes import in_processes, settings
from helpers.tiny_training import PAD, tiny_data, tiny_peft
from lorakeet.config import RunConfig, read_run
from lorakeet.data.collate import PaddingCollator
from lorakeet.train import run
from lorakeet.train.processes.agreement import check_agreement, settings_facts
from lorakeet.train.processes.launch import join_processes
from lorakeet.train.trainer import Trainer


def compare(*facts: dict[str, str]) -> None:
    state = join_processes(torch.device("cpu"))
    check_agreement(facts[state.process_index])


@pytest.mark.slow
def test_every_difference_is_named_in_all_processes() -> None:
    outcomes = in_processes(
        compare, {"train.lr": "0.1", "the data": "a"}, {"train.lr": "0.2", "train.seed": "1", "the data": "a"}
    )
    for outcome in outcomes:
        assert outcome.error is not None and "train.lr is 0.1 in process 0 and 0.2 in process 1" in outcome.error
        assert (
            "train.seed is not set in process 0 and 1 in process 1" in outcome.error and "the data" not in outcome.error
        )
    assert [outcome.error for outcome in in_processes(compare, {"a": "1"}, {"a": "1"})] == [None, None]


def test_settings_and_versions_are_facts() -> None:
    facts = settings_facts(RunConfig())
    assert facts["train.seed"] == "42" and facts["the version of torch"] == torch.__version__ and facts["out"]


def train_a_model(folder: Path, kind: str) -> None:
    """Train a model that differs in process 1 as told."""
    state = join_processes(torch.device("cpu"))
    other = state.process_index == 1
    model: Any = tiny_peft(0.0, init_lora_weights=False)
    if other and kind == "weights":
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 1e-6
    data = tiny_data(16)
    if other and kind == "order":
        data = data.select(range(15, -1, -1))
    settings: dict[str, Any] = {"max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(str(folder), seed=7 if other and kind == "seed" else 6, **settings)
    Trainer(model, args, train_dataset=data, data_collator=PaddingCollator(PAD)).train()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("weights", "1 weights differ between processes before the first step: model.layers.1.mlp.up_proj.weight"),
        pytest.param("seed", "seed is 6 in process 0 and 7 in process 1", marks=pytest.mark.slow),
        pytest.param("order", "data is ", marks=pytest.mark.slow),
        pytest.param("none", None, marks=pytest.mark.slow),
    ],
)
def test_a_trainer_whose_processes_differ_is_refused(tmp_path: Path, kind: str, told: str | None) -> None:
    for outcome in in_processes(train_a_model, tmp_path, kind):
        assert outcome.error is None if told is None else told in (outcome.error or "")


def run_with(file: Path, kind: str) -> None:
    """Start a run whose settings or data differ in process 1 as told."""
    config = read_run(file)
    if os.environ["RANK"] == "1" and kind == "settings":
        config = config.model_copy(update={"lora": config.lora.model_copy(update={"r": 2})})
    if os.environ["RANK"] == "1" and kind == "data":
        texts = Path(config.data.path)
        other = texts.with_name("other.txt")
        other.write_text(texts.read_text(encoding="utf-8").replace("parrot", "bird", 1), encoding="utf-8")
        real = run.prepare
        run.prepare = lambda data, *rest, **more: real(data.model_copy(update={"path": str(other)}), *rest, **more)
    run.run_training(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "told"), [("settings", "lora.r is 4 in process 0 and 2 in process 1"), ("data", "the data is ")]
)
def test_a_run_whose_processes_differ_writes_nothing(tmp_path: Path, kind: str, told: str) -> None:
    file = settings(tmp_path, "run")
    for outcome in in_processes(run_with, file, kind):
        assert outcome.error is not None and told in outcome.error, outcome
    assert not (tmp_path / "run").exists()
