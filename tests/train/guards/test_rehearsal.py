"""The rehearsal before the first step: what it runs, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn

from helpers.tiny_training import tiny_data, tiny_llama, tiny_peft
from lorakeet.errors import TrainingError
from lorakeet.train.checkpoints import resumable
from lorakeet.train.guards.memory import is_out_of_memory, memory_errors
from lorakeet.train.guards.rehearsal import rehearse, same_state
from lorakeet.train.guards.sample_order import steps_of_epoch
from lorakeet.train.trainer import Trainer


def state(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    return [torch.get_rng_state(), model.training, [t.clone() for t in tensors], [p.grad for p in model.parameters()]]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, list):
        return all(same(a, b) for a, b in zip(first, second, strict=True))
    return torch.equal(first, second) if torch.is_tensor(first) else first is second


@pytest.mark.parametrize("make", [tiny_peft, tiny_llama])
def test_a_rehearsal_leaves_nothing_behind(
    make: Any, make_args: Any, collator: Any, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO", logger="lorakeet")
    model = make()
    args = make_args(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    data = {"train_dataset": tiny_data(), "eval_dataset": tiny_data(9)}
    trainer = Trainer(model, args, data_collator=collator, **data)
    trainer.train()
    trainer.model_wrapped.zero_grad()
    seen: list[tuple[bool, int]] = []
    model.register_forward_pre_hook(
        lambda module, _, given: seen.append((module.training, given["input_ids"].numel())), with_kwargs=True
    )
    before, files = state(model), sorted(tmp_path.rglob("*"))
    caplog.clear()
    rehearse(trainer)
    assert same(state(model), before) and sorted(tmp_path.rglob("*")) == files
    assert seen == [(False, 4 * 17), (True, 4 * 17)]
    said = "a checkpoint, written and read back, an evaluation of the longest samples, the longest pass of 68 tokens"
    assert said in caplog.text


@pytest.mark.parametrize("budget", [0, 10_000])
def test_the_rehearsal_is_the_largest_pass_that_comes(budget: int, make_args: Any, collator: Any) -> None:
    """The longest samples of all never meet in a step here, so their pass is not rehearsed."""
    lengths = [30, *[3, 4, 5] * 5, 31, *[3, 4, 5] * 5]
    data = datasets.Dataset.from_dict(
        {"input_ids": [[5] * n for n in lengths], "labels": [[5] * n for n in lengths], "length": lengths}
    )
    model, seen = tiny_peft(0.0), []
    model.register_forward_pre_hook(
        lambda module, _, given: seen.append(given["input_ids"].shape) if module.training else None, with_kwargs=True
    )
    args = make_args(gradient_accumulation_steps=2, max_steps=8)
    trainer = Trainer(model, args, train_dataset=data, data_collator=collator, token_budget=budget)
    trainer.train()
    rehearsed, *trained = [rows * columns for rows, columns in seen]
    assert rehearsed == max(trained)
    loader = trainer.callback_handler.train_dataloader
    assert list(steps_of_epoch(loader, 2, 0)) == list(steps_of_epoch(loader, 2, 0))


def test_a_batch_norm_does_not_count_a_rehearsal() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with same_state(model):
        model.eval()
        model.train()(torch.randn(8, 4))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_that_cannot_be_read_back_ends_the_run(
    make_args: Any, collator: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    honest = resumable.write_manifest

    def tear(folder: Path, *rest: Any) -> None:
        honest(folder, *rest)
        (folder / "optimizer.json").write_text("{}")

    monkeypatch.setattr(resumable, "write_manifest", tear)
    args = make_args(save_strategy="steps", save_steps=2)
    with pytest.raises(TrainingError, match=r"rehearsal is incomplete: optimizer\.json"):
        Trainer(tiny_peft(), args, train_dataset=tiny_data(), data_collator=collator).train()
    assert not list((tmp_path / "out").glob("*"))


def test_memory_that_runs_out_in_a_step_names_it(make_args: Any, collator: Any) -> None:
    model, passes = tiny_peft(0.0), [0]

    def ask(module: nn.Module, *_: Any) -> None:
        passes[0] += module.training
        if passes[0] == 6:  # the rehearsal and two steps have passed
            torch.empty(2**50, dtype=torch.uint8)

    model.register_forward_pre_hook(ask)
    with pytest.raises(
        TrainingError, match=r"memory ran out during step 3 of 6 \(1,125,899\.9 GB more asked for\)"
    ) as error:
        Trainer(model, make_args(), train_dataset=tiny_data(), data_collator=collator).train()
    assert "train.batch_size" in str(error.value.hint) and isinstance(error.value.__cause__, RuntimeError)


def test_errors_of_memory_and_others() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes differ"), memory_errors(lambda: "a step"):
        raise RuntimeError("shapes differ")
