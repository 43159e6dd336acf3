"""``TrainingArguments`` of a run, from its settings."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from lorakeet.base.load import Base
from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, TrainingError


def training_arguments(config: RunConfig, base: Base) -> TrainingArguments:
    """Return the run's settings as ``TrainingArguments``.

    Raises:
        TrainingError: The base is on another GPU than this process trains on.
    """
    train = config.train
    keep_best = train.keep_best or train.load_best
    args = TrainingArguments(
        output_dir=str(Path(config.out) / "checkpoints"),
        max_steps=train.steps or -1,
        num_train_epochs=train.epochs or 1,  # unless there are steps
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.grad_accum,
        learning_rate=train.lr,
        warmup_steps=train.warmup,
        # plain "constant" would ignore the warm-up silently
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        data_seed=train.seed,
        bf16=base.dtype == torch.bfloat16,
        fp16=base.dtype == torch.float16,
        logging_steps=train.log_every,
        eval_strategy="steps" if train.eval_every else "no",
        eval_steps=train.eval_every,
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or 500,
        save_total_limit=train.keep_checkpoints + keep_best,
        metric_for_best_model="loss",
        greater_is_better=False,
        include_num_input_tokens_seen="non_padding",
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    args.load_best_model_at_end = train.load_best  # the parent would allow it only at steps that are saved anyway
    here = args.device  # the first use: joins the other processes, if there are any
    if base.device.type == "cuda" and (base.device.index or 0) != (here.index or 0):
        raise TrainingError(
            f"the base is on {base.device}, this process trains on {here}",
            f"use --device auto, and CUDA_VISIBLE_DEVICES={base.device.index} to choose a GPU",
        )
    return args


def check_best(config: RunConfig) -> None:
    """Check that a run which keeps its best checkpoint measures more than its end.

    Raises:
        ConfigError: Held-out figures are only measured before and after the training, or not at all.
    """
    name = "load_best" if config.train.load_best else "keep_best"
    if getattr(config.train, name) and config.train.eval_every is None:
        raise ConfigError(
            f"train.{name} compares held-out losses during the training, but train.eval_every is not set",
            f"add train.eval_every=STEPS, or leave train.{name} out",
        )
