"""Resuming and loading the best: every adapter from its own folder, all that trained, and only from whole checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from helpers.tiny import shake
from helpers.tiny_training import tiny_data, tiny_llama, tiny_peft
from lorakeet import LoraConfig, PeftModel, Trainer, get_peft_model
from lorakeet.errors import AdapterError, LorakeetError, TrainingError

SETTINGS: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}


class Keep(TrainerCallback):
    """Callback that keeps the trainable tensors of every step, and of the start."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps = model, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps[state.global_step] = tensors(self.model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps[state.global_step] = tensors(self.model)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if ".weight" in name}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def adapted(*names: str, active: list[str]) -> PeftModel:
    model = get_peft_model(tiny_llama(), LoraConfig(**SETTINGS), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**SETTINGS))
        shake(model, name, seed=len(name))
    model.set_adapter(active)
    return model


def unfrozen() -> PeftModel:
    model = tiny_peft(dropout=0.2)
    model.model.norm.weight.requires_grad_(True)
    model.model.embed_tokens.weight.requires_grad_(True)
    return model


MODELS = {
    "one of another name": lambda: adapted("mine", active=["mine"]),
    "a frozen default": lambda: adapted("default", "policy", active=["policy"]),
    "a frozen other": lambda: adapted("default", "ref", active=["default"]),
    "two that learn": lambda: adapted("default", "policy", active=["default", "policy"]),
    "without default": lambda: adapted("a", "b", active=["b", "a"]),
    "unfrozen parameters": unfrozen,
}


@pytest.fixture
def fit(make_args, collator, tmp_path):
    def run(
        model: nn.Module, folder: str, resume: str | bool | None = None, any_checkpoint: bool = False, **changes: Any
    ):
        keep = Keep(model)
        values = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            **changes,
        }
        trainer = Trainer(
            model,
            make_args(output_dir=str(tmp_path / folder), **values),
            train_dataset=tiny_data(16),
            eval_dataset=tiny_data(4, seed=1),
            data_collator=collator,
            callbacks=[keep],
            any_checkpoint=any_checkpoint,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / resume) if isinstance(resume, str) else resume)
        return trainer, keep.steps

    return run


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_resumed_and_best_are_the_runs_own(make, fit, tmp_path: Path) -> None:
    whole = make()
    _, steps = fit(whole, "run")
    resumed = make()
    _, later = fit(resumed, "run", resume="run/checkpoint-2")
    assert equal(later[2], steps[2]) and equal(tensors(resumed), tensors(whole))
    best = make()
    worst_is_best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer, steps = fit(best, "best", **worst_is_best)
    assert equal(tensors(best), steps[trainer.state.best_global_step])
    trainer.state.best_model_checkpoint = str(tmp_path / "best" / "checkpoint-2")
    trainer._load_best_model()
    assert equal(tensors(best), steps[2]) and not equal(steps[2], steps[4])


def test_a_checkpoint_without_the_adapter_is_refused_before_the_first_step(fit, tmp_path: Path) -> None:
    fit(adapted("mine", active=["mine"]), "run")
    model = adapted("other", active=["other"])
    before = tensors(model)
    with pytest.raises(AdapterError, match="no adapter 'other', it has 'mine'"):
        fit(model, "run", resume="run/checkpoint-2", any_checkpoint=True)
    assert equal(tensors(model), before)


def test_unfrozen_parameters_are_named_before_the_first_step(fit, caplog: pytest.LogCaptureFixture) -> None:
    class StopError(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise StopError

    model = unfrozen()
    model.register_forward_pre_hook(stop)
    with caplog.at_level("WARNING", logger="lorakeet"), pytest.raises(StopError):
        fit(model, "run", eval_strategy="no")
    assert "2 tensors of the base are trained" in caplog.text and "model.norm.weight" in caplog.text


def test_weights_alone_are_not_resumed(fit, caplog: pytest.LogCaptureFixture) -> None:
    fit(tiny_peft(), "run", save_only_model=True)
    with pytest.raises(TrainingError, match="save_only_model"):
        fit(tiny_peft(), "run", resume=True)
    with caplog.at_level("WARNING", logger="lorakeet"):
        fit(tiny_peft(), "run", resume="run/checkpoint-2", any_checkpoint=True)
    assert "does not hold optimizer, learning rate schedule, random state" in caplog.text


@pytest.mark.parametrize("gone", ["optimizer.json", "scheduler.json", "process_0.json", "trainer_state.json"])
def test_a_part_that_is_lost_with_its_manifest_is_said(gone: str, fit, tmp_path: Path, caplog) -> None:
    fit(tiny_peft(), "run")
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / gone).unlink()
    with pytest.raises(LorakeetError, match="is incomplete"):
        fit(tiny_peft(), "run", resume="run/checkpoint-2")
    (folder / "lorakeet_checkpoint.json").unlink()  # as transformers writes it
    if gone == "trainer_state.json":
        with pytest.raises(TrainingError, match="does not hold number of steps"):
            fit(tiny_peft(), "run", resume="run/checkpoint-2", any_checkpoint=True)
        return
    with caplog.at_level("WARNING", logger="lorakeet"):
        fit(tiny_peft(), "run", resume="run/checkpoint-2", any_checkpoint=True)
    assert "begin afresh" in caplog.text


def test_data_from_its_beginning_is_said(fit, caplog: pytest.LogCaptureFixture) -> None:
    fit(tiny_peft(), "run")
    with caplog.at_level("WARNING", logger="lorakeet"):
        fit(tiny_peft(), "run", resume="run/checkpoint-2", ignore_data_skip=True)
    assert "ignore_data_skip=True" in caplog.text
