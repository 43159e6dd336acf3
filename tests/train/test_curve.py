"""Loss curve of a run with default settings, compared with that of ``peft`` with the padded ``transformers.Trainer``.

Same base, same starting adapter, same samples of every step, dropout 0. Ours computes no padding and no logits, fuses layers,
and runs the micro-batches of a step in one pass; theirs does none of this. Each of the 50 losses has to be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as tf

from helpers.small_models import KINDS, small
from lorakeet import LoraConfig, PeftModel, Trainer, get_peft_model
from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.collate import PaddingCollator
from lorakeet.data.prepare import prepare
from lorakeet.patches.fused_layers import fused_layers
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.padding_free import padding_free, why_padded

STEPS, ROWS, PASSES = 50, 2, 2  # samples of a micro-batch, micro-batches of a step
PAD = 1
Arguments = Callable[..., tf.TrainingArguments]


def ragged_rows(count: int = 80) -> datasets.Dataset:
    """Return rows of 1 to 23 random ids that share a learnable beginning, with their lengths."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 24, (count,), generator=generator).tolist()
    ids = [torch.randint(2, 5 + length, (length,), generator=generator).tolist() for length in lengths]
    return datasets.Dataset.from_dict({"input_ids": ids, "length": lengths})


def curve(trainer: tf.Trainer) -> list[float]:
    trainer.remove_callback(tf.PrinterCallback)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def largest_difference(
    base: Callable[[], Any], rows: datasets.Dataset, args: tf.TrainingArguments, pad: int, folder: Path, targets: Any
) -> float:
    """Return the largest difference between the losses of a step, in nats."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    get_peft_model(base(), config).save_pretrained(folder)
    shared: dict[str, Any] = {"args": args, "data_collator": PaddingCollator(pad)}
    plain = tf.Trainer(
        peft.PeftModel.from_pretrained(base(), folder, is_trainable=True),
        train_dataset=rows.remove_columns("length"),
        **shared,
    )
    plain._loss_shifts_labels = True  # unknown for GPT2LMHeadModel; the first token of each sample would count too
    wanted = curve(plain)
    model = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    with ExitStack() as fast:
        for way in (fused_loss, fused_layers) if why_padded(model) else (padding_free, fused_loss, fused_layers):
            fast.enter_context(way(model))
        found = curve(Trainer(model, train_dataset=rows, token_budget=2048, **shared))
    assert len(found) == len(wanted) == args.max_steps
    fall = sum(wanted[:5]) / 5 - sum(wanted[-5:]) / 5
    difference = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    print(f"largest difference {difference:.1e}, while the loss falls by {fall:.2f}")
    assert fall > 0.1  # the comparison means little for weights that hardly change
    return difference


@pytest.fixture
def arguments(make_args: Arguments) -> Arguments:
    def make(**changes: Any) -> tf.TrainingArguments:
        counts = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": PASSES}
        return make_args(**{"max_steps": STEPS, "warmup_steps": 5, "data_seed": 3, **counts, **changes})

    return make


def test_a_tiny_model(arguments: Arguments, tmp_path: Path) -> None:
    args = arguments(learning_rate=1e-2)
    found = largest_difference(
        lambda: small("llama"), ragged_rows(), args, PAD, tmp_path / "start", ["q_proj", "v_proj"]
    )
    assert found < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bloom", "gpt2", "opt", *KINDS])
def test_architectures(kind: str, arguments: Arguments, tmp_path: Path) -> None:
    args = arguments(learning_rate=1e-2)
    found = largest_difference(
        lambda: small(kind, attention="eager" if kind == "bloom" else None),
        ragged_rows(),
        args,
        PAD,
        tmp_path / "start",
        "all-linear",
    )
    assert found < 1e-5


@pytest.mark.slow
def test_smollm2_on_quotations(smollm2: Path, arguments: Arguments, tmp_path: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(smollm2)
    settings = DataSettings(path="fortunes", limit=400, max_length=64)
    data = prepare(settings, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=1).train
    rows, args = data.select_columns(["input_ids", "length"]), arguments(learning_rate=1e-3)

    def base() -> Any:
        return tf.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    found = largest_difference(base, rows, args, tokenizer.pad_token_id, tmp_path / "start", ["q_proj", "v_proj"])
    assert found < 1e-3
