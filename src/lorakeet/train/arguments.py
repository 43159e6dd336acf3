"""``TrainingArguments`` of a run, from its settings."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from lorakeet.base.load import Base
from lorakeet.config import RunConfig
from lorakeet.errors import TrainingError


def training_arguments(config: RunConfig, base: Base) -> TrainingArguments:
    """Return the run's settings as ``TrainingArguments``.

    Raises:
        TrainingError: The base is on another GPU than this process trains on.
    """
    train = config.train
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
        save_total_limit=2,
        include_num_input_tokens_seen="non_padding",
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    here = args.device  # the first use: joins the other processes, if there are any
    if base.device.type == "cuda" and (base.device.index or 0) != (here.index or 0):
        raise TrainingError(
            f"the base is on {base.device}, this process trains on {here}",
            f"use --device auto, and CUDA_VISIBLE_DEVICES={base.device.index} to choose a GPU",
        )
    return args
