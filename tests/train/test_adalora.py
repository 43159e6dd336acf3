"""AdaLoRA in a training: the ranks end at the target, accumulation changes nothing, plain LoRA is saved."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from helpers.tiny_training import tiny_data, tiny_llama, tiny_peft
from lorakeet import AdaLoraConfig, PeftModel, Trainer
from lorakeet.config import make_run
from lorakeet.errors import ConfigError
from lorakeet.quant.quantize import quantize_
from lorakeet.train.adalora import add_penalty_gradient
from lorakeet.train.run import run_training

SCHEDULE = {"target_r": 2, "init_r": 4, "tinit": 1, "tfinal": 2}


def adaptive(**own: Any) -> PeftModel:
    return tiny_peft(dropout=0.3, r=4, adalora_config=AdaLoraConfig(**{**SCHEDULE, **own}))


def ranks(model: PeftModel) -> list[int]:
    return [int(layer.part("lora_E", "default").count_nonzero()) for layer in model.lora_layers()]


@pytest.mark.parametrize("own", [{}, {"deltaT": 3, "tfinal": 0, "tinit": 0}])
def test_the_ranks_end_at_the_target(own, make_args, collator, tmp_path) -> None:
    model = adaptive(**own)
    if own:
        assert quantize_(model)
    trainer = Trainer(model, make_args(), train_dataset=tiny_data(27), data_collator=collator)
    trainer.train()
    assert sum(ranks(model)) == 8 and len(set(ranks(model))) > 1
    assert "importance of ranks" in trainer._missing_parts(tmp_path)


def test_penalty_and_ranks_do_not_depend_on_accumulation(make_args, collator) -> None:
    ends = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = tiny_peft(dropout=0.0, r=4, adalora_config=AdaLoraConfig(**SCHEDULE))
        args = make_args(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, max_steps=4)
        Trainer(model, args, train_dataset=tiny_data(32), data_collator=collator).train()
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], rtol=0, atol=1e-4)


def test_the_gradient_of_the_penalty_is_that_of_backward() -> None:
    model = adaptive()
    layers, weights = model.lora_layers(), [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    add_penalty_gradient(layers, "default", 4.0)
    added = [weight.grad - 1 for weight in weights]
    model.zero_grad()
    (4.0 * model.orthogonality_loss()).backward()
    for weight, gradient in zip(weights, added, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


def test_a_schedule_that_does_not_fit_is_refused_before_the_first_step(make_args, collator) -> None:
    trainer = Trainer(adaptive(total_step=60), make_args(), train_dataset=tiny_data(9), data_collator=collator)
    with pytest.raises(ConfigError, match="total_step=60 is above the 6 steps of the training"):
        trainer.train()
    with pytest.raises(ConfigError, match="tinit=9 and tfinal=0 leave none of 9 steps"):
        make_run({"train": {"steps": 9}, "lora": {"adalora_config": {"tinit": 9}}})


def test_a_run_saves_plain_lora(base_folder, settings, tmp_path) -> None:
    config = settings(lora__adalora_config=SCHEDULE, train__steps=6)
    summary = run_training(config)
    file = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert file["peft_type"] == "LORA" and "adalora_config" not in file
    model = PeftModel.from_pretrained(tiny_llama(initializer_range=0.2), tmp_path / "run" / "adapter")
    assert sum(layer.r["default"] for layer in model.lora_layers()) >= 2 * len(model.lora_layers())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
