"""Short trainings that record losses and gradients, and batches for several tasks."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    TrainerCallback,
    set_seed,
)

from helpers.tiny_training import PAD, tiny_data
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.padding_free import padding_free
from lorakeet.train.trainer import Trainer


class Gradients(TrainerCallback):
    """Recorder of the gradients of each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append(grads)


def train(model, args, data, collator, kind=Trainer, **more):
    seen = Gradients()
    callbacks = [seen, *more.pop("callbacks", [])]
    trainer = kind(model, args, train_dataset=data, data_collator=collator, callbacks=callbacks, **more)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, seen.steps, trainer


def bert(kind, **changes):
    set_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        initializer_range=0.5,
        **changes,
    )
    return kind(config)


def classes(samples):
    """Build the batch of a classifier: one label for each sample."""
    longest = max(len(s["input_ids"]) for s in samples)
    ids = torch.tensor([s["input_ids"] + [PAD] * (longest - len(s["input_ids"])) for s in samples])
    return {
        "input_ids": ids,
        "attention_mask": ids.ne(PAD).long(),
        "labels": torch.tensor([sum(s["input_ids"]) % 3 for s in samples]),
    }


def masked(samples):
    """Build the batch of a masked language model: even ids are targets, -100 elsewhere; some rows have no target."""
    batch = classes(samples)
    batch["labels"] = batch["input_ids"].where((batch["input_ids"] % 2 == 0) & (batch["input_ids"] > 20), -100)
    return batch


POISON = 39


def poisoned(model):
    """Make the loss NaN at token 39."""
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")
    return model


def with_poison(at):
    rows = [{"input_ids": [i % 38 for i in row["input_ids"]]} for row in tiny_data(48)]
    rows[at]["input_ids"][1] = POISON
    return Dataset.from_list(rows)


SPIKE = 39


def spiking(model):
    """Make token 39 so improbable that a step with it as a target has a loss far above all others."""
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight.data.copy_(model.lm_head.weight)
    head.bias.data.zero_()[SPIKE] = -5000.0
    model.lm_head = head.requires_grad_(False)
    return model


def with_spike(at, rows=400):
    """Return rows of which one has the token 39."""
    ids = [[i % 38 for i in row["input_ids"]] for row in tiny_data(rows)]
    ids[at][1] = SPIKE
    return Dataset.from_dict({"input_ids": ids})


class Forget(TrainerCallback):
    """Empties a list when the first epoch begins: the rehearsal is no part of the training."""

    def __init__(self, noted):
        self.noted = noted

    def on_train_begin(self, args, state, control, **_):
        self.fresh = True

    def on_epoch_begin(self, args, state, control, **_):
        if self.fresh:
            self.noted.clear()
        self.fresh = False


def learn(model: nn.Module, args: Any, data: Any, collate: Any, budget: int | None, **more: Any) -> Any:
    """Train; return losses, gradients of each step, rows and real tokens of each pass, and the Trainer."""
    passes: list[tuple[int, int]] = []

    def note(module: nn.Module, _: Any, given: dict[str, Any]) -> None:
        if module.training:
            passes.append((len(given["input_ids"]), int(given["attention_mask"].sum())))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    with padding_free(model), fused_loss(model):
        losses, gradients, trainer = train(
            model, args, data, collate, token_budget=budget, callbacks=[Forget(passes)], **more
        )
    handle.remove()
    return losses, gradients, passes, trainer
