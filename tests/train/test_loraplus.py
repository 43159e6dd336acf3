"""LoRA+: rates, groups and loss curve of PEFT's own optimizer; resumed only with the ratio of the run."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lorakeet
from helpers.random_rows import collate, rows
from helpers.tiny import make
from helpers.tiny_training import tiny_data, tiny_llama, tiny_peft
from lorakeet import LoraConfig, PeftModel, Trainer, get_peft_model
from lorakeet.config import make_run
from lorakeet.errors import ConfigError, TrainingError
from lorakeet.train.checkpoints.manifest import latest_checkpoint
from lorakeet.train.loraplus import LoraPlus

SETTINGS: dict[str, dict[str, Any]] = {
    "pairs": {"base": "llama", "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    "an embedding too": {"base": "bert", "target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"},
    "bias of B": {"base": "opt", "target_modules": ["q_proj", "fc1"], "lora_bias": True},
    "all biases": {"base": "bert", "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
    "magnitudes": {"base": "bert", "target_modules": ["query", "word_embeddings"], "use_dora": True},
    "a head": {"base": "bert", "target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    "tokens": {"base": "bert", "target_modules": ["key"], "trainable_token_indices": {"word_embeddings": [3, 5]}},
    "bare parameters": {"base": "llama", "target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
}


def groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[list[str], float, float]]:
    """Return names, learning rate and weight decay of each non-empty group."""
    names = {p: name for name, p in model.named_parameters()}
    for wrapper in ("base_model.model.", "lora_parameters.weight.", "token_adapter."):
        names = {p: name.replace(wrapper, "") for p, name in names.items()}
    told = [(sorted(names[p] for p in g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    return [group for group in told if group[0]]


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.filterwarnings("ignore:Model has")
def test_groups_are_those_of_peft(kind, make_args):
    settings = dict(SETTINGS[kind])
    base = settings.pop("base")
    theirs = peft.get_peft_model(make(base), peft.LoraConfig(r=2, **settings))
    rates = {"lr": 2e-4, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 3e-5}
    wanted = create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates)
    args = make_args(learning_rate=2e-4, weight_decay=0.1)
    ours = get_peft_model(make(base), LoraConfig(r=2, **settings))
    made = Trainer(ours, args, loraplus=LoraPlus(16.0, lr_embedding=3e-5)).create_optimizer()
    assert groups(made, ours) == groups(wanted, theirs)
    assert groups(lorakeet.create_loraplus_optimizer(ours, torch.optim.SGD, **rates), ours) == groups(wanted, theirs)
    assert type(made) is torch.optim.AdamW and made.param_groups[0]["fused"]  # the Trainer's own, only its groups split


def curve(trainer: transformers.Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_loss_curve_is_that_of_pefts_optimizer_and_both_rates_are_scheduled(make_args, tmp_path):
    args = make_args(
        max_steps=8, warmup_steps=3, lr_scheduler_type="cosine", weight_decay=0.1, learning_rate=2e-3, logging_steps=1
    )
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(make("llama"), config).save_pretrained(tmp_path / "start")
    data = {"train_dataset": rows(61), "data_collator": collate}
    theirs = peft.PeftModel.from_pretrained(make("llama").train(), tmp_path / "start", is_trainable=True)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    wanted = curve(transformers.Trainer(theirs, args, optimizers=(optimizer, None), **data))
    trainer = Trainer(
        PeftModel.from_pretrained(make("llama").train(), tmp_path / "start", is_trainable=True),
        args,
        loraplus=16,
        **data,
    )
    got = curve(trainer)
    assert got == pytest.approx(wanted, abs=1e-5)
    plain = PeftModel.from_pretrained(make("llama").train(), tmp_path / "start", is_trainable=True)
    assert curve(Trainer(plain, args, **data)) != pytest.approx(wanted, abs=1e-3)

    told = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]  # that of A
    assert told[:4] == pytest.approx([0.0, 2e-3 / 3, 4e-3 / 3, 2e-3]) and 0 < told[-1] < 2e-3
    now = [group["lr"] for group in trainer.optimizer.param_groups]
    assert len(now) == 2 and now[1] == 16 * now[0]


def test_another_ratio_does_not_resume(make_args, collator):
    def run(name: str, steps: int, ratio: float | None, resume: bool = False, **more: Any) -> Trainer:
        args = make_args(
            output_dir=name, max_steps=6, save_strategy="steps", save_steps=3, lr_scheduler_type="constant", **more
        )
        trainer = Trainer(tiny_peft(0.2), args, train_dataset=tiny_data(), data_collator=collator, loraplus=ratio)
        trainer.train(resume_from_checkpoint=str(latest_checkpoint(name)) if resume else None)
        assert trainer.state.global_step == steps
        return trainer

    folder = make_args().output_dir
    whole = run(folder + "/whole", 6, 8.0)
    parts = folder + "/whole"
    (latest_checkpoint(parts)).rename(folder + "/aside")  # only that of step 3 is left
    resumed = run(parts, 6, 8.0, resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    with pytest.raises(TrainingError, match=r"loraplus_ratio was 8.0, is 4.0"):
        run(parts, 6, 4.0, resume=True)
    with pytest.raises(TrainingError, match=r"loraplus_ratio was 8.0, is not set"):
        run(parts, 6, None, resume=True)


def test_contradictory_settings_are_refused(make_args):
    with pytest.raises(ConfigError, match=r"got the ratio 0.5, expected at least 1"):
        LoraPlus(0.5)
    with pytest.raises(ConfigError, match=r"loraplus_ratio = 0.5"):
        make_run({"train": {"loraplus_ratio": 0.5}})
    with pytest.raises(TrainingError, match="needs a trainable lora_B"):
        Trainer(tiny_llama(), make_args(), loraplus=16).create_optimizer()
    model = tiny_peft()
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(TrainingError, match="both set learning rates"):
        Trainer(model, make_args(), optimizers=(own, None), loraplus=16)
