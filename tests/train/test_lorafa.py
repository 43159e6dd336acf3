"""LoRA-FA: the corrected gradient, peft's optimizer, no kept inputs, a run of its own."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import nn

import lorakeet
from helpers.random_rows import collate, rows
from helpers.tiny import make
from lorakeet import LoraConfig, Trainer, get_peft_model
from lorakeet.errors import TrainingError
from lorakeet.train.lorafa import corrected_gradient

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def adapted(**more: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(make("llama").train(), LoraConfig(**{**SETTINGS, **more}))


def test_the_corrected_step_is_the_nearest_to_the_gradient_of_the_whole_weight() -> None:
    whole, a, scaling = torch.randn(7, 9).double(), torch.randn(3, 9).double(), 0.7
    step = corrected_gradient(scaling * whole @ a.T, a, scaling)
    wanted = torch.linalg.lstsq(scaling * a.T, whole.T).solution.T
    torch.testing.assert_close(step, wanted, rtol=0, atol=1e-7)


def test_steps_are_those_of_pefts_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)  # it rounds the gradient otherwise
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make("llama").train(), peft.LoraConfig(**SETTINGS))
    ours = adapted()
    start = {key.removeprefix("base_model.model."): value.clone() for key, value in theirs.state_dict().items()}
    ours.load_state_dict(start)
    named = {"r": 4, "lora_alpha": 6, "lr": 1e-3}
    optimizers = (lorakeet.create_lorafa_optimizer(ours, **named), create_lorafa_optimizer(theirs, **named))
    batch = collate(rows(4))
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (1e7 * model(**batch).loss).backward()  # peft adds its eps to another sum; here both vanish
            optimizer.step()
    end = {key.removeprefix("base_model.model."): value for key, value in theirs.state_dict().items()}
    for name, p in ours.named_parameters():
        if "lora_B" in name:
            torch.testing.assert_close(p.data, end[name], rtol=1e-4, atol=1e-6)
            assert float(p.detach().abs().max()) > 1e-3
        else:
            assert torch.equal(p, start[name])


def with_saved(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a layer's output, and the tensors kept for its backward pass."""
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return layer(x), saved


def test_no_input_is_kept_for_backward() -> None:
    layer = adapted().get_submodule("model.layers.0.self_attn.q_proj")
    kept: list[int] = []
    for frozen in (False, True):
        layer.lora_A["default"].weight.requires_grad_(not frozen)
        x = torch.randn(5, 32, requires_grad=True)
        h, saved = with_saved(layer, x)
        h.sum().backward()
        kept.append(sum(t is x or t.data_ptr() == x.data_ptr() for t in saved))
        assert x.grad is not None and layer.lora_B["default"].weight.grad is not None
    assert kept == [1, 0]


def test_a_trainer_trains_b_alone(make_args) -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        model, make_args(max_steps=3, learning_rate=1e-2), train_dataset=rows(12), data_collator=collate, lorafa=True
    )
    trainer.train()
    changed = {name.split(".")[-3] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"lora_B"} and trainer._further_fingerprint() == {"lorafa": "True"}


def test_what_has_no_plain_update_is_refused() -> None:
    with pytest.raises(TrainingError, match="LoRA-FA got a DoRA adapter"):
        lorakeet.create_lorafa_optimizer(adapted(use_dora=True), r=4, lora_alpha=6, lr=1e-3)
    with pytest.raises(TrainingError, match="needs a trainable lora_B"):
        lorakeet.create_lorafa_optimizer(nn.Linear(2, 2), r=4, lora_alpha=6, lr=1e-3)
