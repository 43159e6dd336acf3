"""Planted failures of data and trainings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, TrainingArguments

from guards.planting import first, logged, plants, refused
from helpers.disk import files_of_at_most
from helpers.tiny_base import byte_tokenizer
from helpers.tiny_training import PAD, tiny_data, tiny_llama, tiny_peft, tiny_tokenizer
from helpers.training_loop import poisoned, spiking, with_poison, with_spike
from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.collate import PaddingCollator
from lorakeet.data.prepare import prepare
from lorakeet.data.read.record import Location
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.train.checkpoints.manifest import latest_checkpoint
from lorakeet.train.guards import preflight
from lorakeet.train.trainer import Trainer


def trainer(folder: Path, model: nn.Module | None = None, data: Any = None, **changes: Any) -> Trainer:
    """Build the Trainer of a short training whose samples come in their order."""
    own = {name: changes.pop(name) for name in ("eval_dataset", "locations", "spike") if name in changes}
    values: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        **changes,
    }
    return Trainer(
        model or tiny_peft(0.0),
        TrainingArguments(**values),
        train_dataset=data or tiny_data(),
        data_collator=PaddingCollator(PAD),
        processing_class=tiny_tokenizer(),
        **own,
    )


def prepared(folder: Path, rows: list[dict[str, str]], **settings: Any) -> Any:
    """Prepare rows for a causal language model."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataSettings(path=str(folder / "rows.jsonl"), eval_fraction=0, **settings)
    return prepare(data, TaskSettings(type="CAUSAL_LM"), byte_tokenizer(), seed=0)


@plants(6)
def an_end_token_that_also_pads(folder: Path) -> list[str]:
    rows = [{"text": f"a sentence of its own, number {i}"} for i in range(20)]
    return [first(prepared(folder, rows).report.lines(), "end token  ")]


@plants(7)
def labels_that_are_all_cut_away(folder: Path) -> list[str]:
    rows = [{"prompt": f"a question that is long, number {i}", "completion": f"answer {i}"} for i in range(20)]
    return [first(prepared(folder, rows).report.lines(), "train "), refused(prepared, folder, rows, max_length=16)]


@plants(11)
def a_checkpoint_of_other_settings(folder: Path) -> list[str]:
    trainer(folder, save_strategy="steps", save_steps=2).train()
    return [refused(trainer(folder, learning_rate=0.5).train, resume_from_checkpoint=True)]


@plants(12)
def a_checkpoint_that_was_cut(folder: Path) -> list[str]:
    trainer(folder, save_strategy="steps", save_steps=2).train()
    file = folder / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with logged() as messages:
        assert latest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "checkpoint-2"
    return messages


@plants(17)
def a_parameter_without_a_gradient(folder: Path) -> list[str]:
    model = tiny_peft()
    model.model.layers[1].self_attn.q_proj.register_parameter("lora_lost", nn.Parameter(torch.zeros(3)))
    return [refused(trainer(folder, model).train)]


class Louder(LlamaForCausalLM):
    """A model that scales its logits behind the head."""

    def forward(self, *args: Any, labels: Any = None, **settings: Any) -> Any:
        output = super().forward(*args, **settings)
        output.logits = output.logits * 1.5
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


@plants(18)
def logits_that_a_fused_loss_would_change(folder: Path) -> list[str]:
    model = Louder(tiny_llama().config).train()
    batch = PaddingCollator(PAD)(list(tiny_data(4)))
    with logged() as messages, fused_loss(model):
        model(**batch).loss.backward()
    return [messages[0].partition(" (")[0]]


@plants(19)
def fsdp_that_is_not_applied(folder: Path) -> list[str]:
    args = trainer(folder).args
    args.fsdp = True
    return [refused(preflight.check_sharded, tiny_llama(), args)]


@contextmanager
def more_than_there_is(training: bool) -> Iterator[nn.Module]:
    """Yield a model that asks for a petabyte while it trains, or while it is evaluated."""
    model = tiny_peft(0.0)

    def ask(module: nn.Module, *_: Any) -> None:
        if module.training == training:
            torch.empty(2**50, dtype=torch.uint8)

    handle = model.register_forward_pre_hook(ask)
    yield model
    handle.remove()


@plants(20)
def memory_or_disk_that_is_too_small(folder: Path) -> list[str]:
    with more_than_there_is(training=True) as model:
        messages = [refused(trainer(folder, model).train)]
    with more_than_there_is(training=False) as model:
        changes: dict[str, Any] = {"eval_strategy": "steps", "eval_dataset": tiny_data(8)}
        messages.append(refused(trainer(folder, model, **changes).train))
    saves = trainer(folder, save_strategy="steps", save_steps=2)
    with files_of_at_most(2000):
        messages.append(refused(saves.train))
    return messages


@plants(23)
def values_that_are_not_finite_and_spikes(folder: Path) -> list[str]:
    lines = [Location("texts.txt", number) for number in range(1, 401)]
    stops = trainer(folder, poisoned(tiny_peft()), with_poison(21), locations=lines)
    jumps = trainer(folder, tiny_peft(0.0), with_spike(325), max_steps=42, locations=lines)
    spiking(jumps.model)
    told = [refused(stops.train).splitlines(), refused(jumps.train).splitlines()]
    return [told[0][0], first(told[0], "texts.txt:22"), told[1][0], first(told[1], "texts.txt:326")]
