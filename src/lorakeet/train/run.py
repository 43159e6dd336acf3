"""A whole run: from settings to an adapter, its figures and its picture, all in one folder.

The folder holds ``run.yaml`` (complete; alone repeats the run), ``metrics.jsonl``, ``summary.json``,
``loss_curve.png``, ``adapter/`` and, where there are any, ``checkpoints/``. Nothing is written elsewhere but the cache.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainingArguments, set_seed

from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.base.architectures import AUTO_CLASSES, check_task, family, fresh_modules
from lorakeet.base.load import Base, ModelInfo, inspect_model, load_base
from lorakeet.base.quiet import quiet
from lorakeet.config import RunConfig, TaskSettings
from lorakeet.data.collate import make_collator
from lorakeet.data.encode.render import describe_sample
from lorakeet.data.prepare import prepare
from lorakeet.data.prepared import Prepared
from lorakeet.data.rows.column_mapping import choose_task
from lorakeet.data.rows.load import peek
from lorakeet.errors import ConfigError, TrainingError
from lorakeet.files import write_folder, write_json
from lorakeet.log import info, log, warn
from lorakeet.lora.config import LoraConfig
from lorakeet.lora.layer_types import adaptable
from lorakeet.patches.fused_layers import fused_layers
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.gradient_checkpointing import recomputed
from lorakeet.patches.padding_free import padding_free, why_padded
from lorakeet.quant.protocol import has_quantized
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.runs.run_folder import check_run_folder, claim_folder, refuse_other_settings
from lorakeet.tasks.task import Task
from lorakeet.train.checkpoint import latest_checkpoint
from lorakeet.train.interrupt import StopAfterStep
from lorakeet.train.loraplus import LoraPlus
from lorakeet.train.memory_plan import every_that_fits
from lorakeet.train.memory_probe import free_memory
from lorakeet.train.progress_callback import ProgressCallback, draw_loss_curve
from lorakeet.train.summary import compared, summarize
from lorakeet.train.task_trainer import TaskTrainer
from lorakeet.train.trainer import Trainer

__all__ = ["InterruptedRunError", "Run", "check_run_folder", "run_training", "training_arguments"]


class InterruptedRunError(TrainingError):
    """The run was stopped by a person or by the machine, and can go on."""

    exit_code = 130  # as the shell has it for a program that was interrupted


def run_training(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, any_checkpoint: bool = False
) -> dict[str, Any]:
    """Train an adapter as ``config`` says; returns what is in ``summary.json``.

    Under torchrun or accelerate every process calls this; only the main one writes and speaks.

    Args:
        config: All settings. ``config.out`` is the run's folder.
        resume: Go on from the newest whole checkpoint (from the start, if there is none yet).
        overwrite: Replace a run that the folder holds.
        any_checkpoint: Resume although settings, data or number of processes differ.

    Raises:
        OutputError: the folder cannot be written to, holds a run already, or holds none to resume.
        DataError, BaseModelError, TargetError, ConfigError: see the rooms that raise them; nothing is written then.
        InterruptedRunError: Ctrl-C or SIGTERM; a checkpoint is saved and the hint says how to go on.
        TrainingError: the run must not go on, see :class:`lorakeet.train.trainer.Trainer`.
    """
    began = time.perf_counter()
    if int(os.environ.get("RANK", "0")) > 0:
        log.setLevel("ERROR")
    folder = Path(config.out)
    check_run_folder(folder, resume=resume, overwrite=overwrite)
    if resume and not any_checkpoint:
        refuse_other_settings(config, folder)
    prospect = inspect_model(config.base)
    chosen = choose(config, prospect)
    state = PartialState()
    state.wait_for_everyone()  # until every process has checked the folder, none writes to it
    with state.main_process_first():  # broken data is told before a base of many gigabytes is read
        limit = getattr(prospect.config.get_text_config(), "max_position_embeddings", None)
        data = prepare(config.data, chosen, prospect.tokenizer, seed=config.train.seed, max_positions=limit)
    task = Task(chosen.type, data.problem, data.labels)
    base = load_base(
        config.base, auto_class=AUTO_CLASSES[task.name], model_options=task.model_options(), for_training=True
    )
    info(f"base       {base.describe()}")
    args = training_arguments(config, base)
    args.eval_strategy = "no" if data.held_out is None else args.eval_strategy
    set_seed(config.train.seed)
    model = get_peft_model(base.model, adapter_config(config, base, task))
    _say_plan(config, base, model, data, task, args)
    if args.process_index == 0:
        claim_folder(folder, config, resume=resume)
    run = Run(config, folder, base, model, data, chosen, task, args, began)
    with quiet(), StopAfterStep() as stop:
        return run.train(stop, resume, any_checkpoint)


def choose(config: RunConfig, prospect: ModelInfo) -> TaskSettings:
    """The task's settings with a concrete type, one that model and data allow.

    Raises:
        BaseModelError: the architecture has no model for the task.
        ConfigError: a stream without a number of steps.
    """
    if config.data.stream and config.train.steps is None:
        raise ConfigError("data.stream reads without knowing the end, and train.steps is not set", "give --steps")
    name = config.task.type
    if name == "auto":
        architecture = family(prospect.config)
        types = peek(config.data) if architecture == "encoder" else {}  # only then do the columns decide
        name = choose_task(architecture, types, config.data.columns)
    check_task(name, prospect.config, prospect.name)
    return config.task.model_copy(update={"type": name})


def adapter_config(config: RunConfig, base: Base, task: Task) -> LoraConfig:
    """The adapter's configuration: as in the settings, and whatever begins at random is trained whole."""
    settings = config.lora.model_dump()
    if task.name == "FEATURE_EXTRACTION":  # reads hidden states: no head, and nothing that only a head would read
        unread = [
            name for name, module in base.model.named_modules() if name.startswith("pooler.") and adaptable(module)
        ]
        if unread and not isinstance(settings["exclude_modules"], str):
            settings["exclude_modules"] = [*(settings["exclude_modules"] or []), *unread]
    else:
        fresh = fresh_modules(base.model, base.fresh)
        settings["modules_to_save"] = list(dict.fromkeys([*(settings["modules_to_save"] or []), *fresh])) or None
    name = {"base_model_name_or_path": base.name, "revision": config.base.revision}
    return LoraConfig(**settings, task_type=task.peft_type, **name)


def training_arguments(config: RunConfig, base: Base) -> TrainingArguments:
    """The run's settings in the terms of transformers.

    Raises:
        TrainingError: the base is on another GPU than the one that this process trains on.
    """
    train = config.train
    args = TrainingArguments(
        output_dir=str(Path(config.out) / "checkpoints"),
        max_steps=train.steps or -1,
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.grad_accum,
        learning_rate=train.lr,
        warmup_steps=train.warmup,
        # plain "constant" would pass over the warm-up without a word
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


def _say_plan(
    config: RunConfig, base: Base, model: PeftModel, data: Prepared, task: Task, args: TrainingArguments
) -> None:
    """What is about to happen, before it does."""
    trainable, every = model.get_nb_trainable_parameters()
    train = config.train
    per_step = train.batch_size * train.grad_accum * args.world_size
    rows = data.report.train_samples
    steps = train.steps or -(-rows * train.epochs // per_step)
    length = f"{steps:.0f} steps of {per_step} samples ({train.batch_size} x {train.grad_accum}"
    length += f" x {args.world_size} processes)" if args.world_size > 1 else ")"
    info(f"adapter    r={config.lora.r}, alpha={config.lora.lora_alpha:g}: {trainable:,} of {every:,} parameters learn")
    for line in data.report.lines():
        info(line)
    passes = f", {steps * per_step / rows:.2g} epochs" if rows else ""
    info(f"training   {length}{passes}, peak learning rate {train.lr:g}")
    if plus := _loraplus(config):
        _, embeddings, faster = plus.rates(train.lr)
        info(f"LoRA+      peak learning rate of B {faster:g}, of pairs on embeddings {embeddings:g}")
    first = next(iter(data.train))
    info(f"a sample   {describe_sample(base.tokenizer, first, task.name, task.labels, colour=sys.stderr.isatty())}")
    if train.warmup >= steps:
        warn(f"the warm-up takes {train.warmup} of {steps:.0f} steps: the learning rate never reaches its peak")


def _loraplus(config: RunConfig) -> LoraPlus | None:
    train = config.train
    return None if train.loraplus_ratio is None else LoraPlus(train.loraplus_ratio, train.loraplus_lr_embedding)


#: Tokens of a pass with which a CPU is busy: products of more rows are hardly faster, and their activations take memory. In 8
#: bits what a pass costs beside its tokens is a larger share, and there is more memory left.
ENOUGH_FOR_A_CPU, ENOUGH_IN_8_BITS = 768, 1024


@dataclass
class Run:
    """What a run works with, once everything has been checked."""

    config: RunConfig
    folder: Path
    base: Base
    model: PeftModel
    data: Prepared
    chosen: TaskSettings
    task: Task
    args: TrainingArguments
    began: float

    def train(self, stop: StopAfterStep, resume: bool, any_checkpoint: bool) -> dict[str, Any]:
        """Held-out loss, training, adapter, held-out loss, summary."""
        report = ProgressCallback(self.folder / "metrics.jsonl")
        trainer = self._trainer([report, stop], any_checkpoint)
        with ExitStack() as fast:
            fast.enter_context(self._unpadded())
            if self.config.train.fused_loss:
                fast.enter_context(fused_loss(self.model))
            if self.config.train.fused_layers:
                fast.enter_context(fused_layers(self.model))
            fast.enter_context(self._thrifty(trainer))
            self._learn(trainer, report, stop, resume, any_checkpoint)
            summary = summarize(self, trainer, report)
        self._save(trainer, summary)
        if self.args.process_index == 0:
            self._finish(trainer, summary)
        trainer.accelerator.wait_for_everyone()
        return summary

    def _unpadded(self) -> AbstractContextManager[Any]:
        """While this holds, the layers compute nothing for padding, where that is proven to change nothing else."""
        if not self.config.train.padding_free:
            return nullcontext()
        if reason := why_padded(self.model):
            info(f"padding    is computed: {reason}")
            return nullcontext()
        return padding_free(self.model)

    def _thrifty(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """While this holds, layers are run again in the backward pass: as told, or as memory needs."""
        every: bool | int | str | None = self.config.train.gradient_checkpointing
        if every == "auto":
            every = every_that_fits(trainer, free_memory(self.args.device), self.config.data.max_length)
        return recomputed(self.model, int(every)) if every else nullcontext()

    def _token_budget(self) -> int:
        """Real tokens of a pass; unless told what the largest micro-batch may hold, on a CPU what is worth its memory."""
        train = self.config.train
        if train.token_budget is not None:
            return train.token_budget
        full = train.batch_size * self.config.data.max_length
        enough = ENOUGH_IN_8_BITS if has_quantized(self.model) else ENOUGH_FOR_A_CPU
        return min(full, enough) if self.args.device.type == "cpu" else full

    def _learn(
        self, trainer: Trainer, report: ProgressCallback, stop: StopAfterStep, resume: bool, any_checkpoint: bool
    ) -> None:
        start = latest_checkpoint(self.args.output_dir) if resume else None
        if resume:
            info(f"going on from {start}" if start else "no whole checkpoint yet: starting from the beginning")
        try:
            if start is None:
                self._measure(trainer, 0)
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        finally:
            report.close()
        if stop.stopped:
            raise InterruptedRunError(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, everything is saved",
                f"go on with: lorakeet train {self.folder / 'run.yaml'} --resume",
            )
        self._save(trainer, {})
        info(f"adapter    {self.folder / 'adapter'}")
        self._measure(trainer, trainer.state.global_step)

    def _trainer(self, callbacks: list[Any], any_checkpoint: bool) -> Trainer:
        held_out = self.data.held_out
        if held_out is not None:  # neighbours of one length: little padding
            lengths = held_out["length"]
            held_out = held_out.select(sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)))
        settings: dict[str, Any] = {
            "model": self.model,
            "args": self.args,
            "train_dataset": self.data.train,
            "eval_dataset": held_out,
            "data_collator": make_collator(self.chosen, self.base.tokenizer, self.model),
            "processing_class": self.base.tokenizer,
            "callbacks": callbacks,
            "any_checkpoint": any_checkpoint,
            "non_finite": self.config.train.non_finite,
            "token_budget": self._token_budget(),
            "loraplus": _loraplus(self.config),
        }
        trainer = Trainer(**settings) if self.task.name == "CAUSAL_LM" else TaskTrainer(**settings, task=self.task)
        trainer.remove_callback(PrinterCallback)  # prints to stdout
        return trainer

    def _measure(self, trainer: Trainer, step: int) -> None:
        """The held-out loss at this step, unless it is in ``metrics.jsonl`` already."""
        if self.data.held_out is None:
            return
        lines = read_metrics(self.folder / "metrics.jsonl")
        if not any(line["step"] == step and "eval_loss" in line for line in lines):
            trainer.evaluate()

    def _save(self, trainer: Trainer, summary: dict[str, Any]) -> None:
        """The adapter with its tokenizer and chat template, whole or not at all."""
        if self.args.process_index == 0:
            with write_folder(self.folder / "adapter") as aside:
                notes = {
                    key: value for key, value in summary.items() if key != "adapter_path"
                }  # a place on this machine
                told = {"task": self.task.notes(), "data": self.data.report.content_hash}
                self.model.save_pretrained(aside, notes={**notes, **told})
                self.base.tokenizer.save_pretrained(aside)
        trainer.accelerator.wait_for_everyone()

    def _finish(self, trainer: Trainer, summary: dict[str, Any]) -> None:
        checkpoints = Path(self.args.output_dir)
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()
        title = f"{self.base.name}, r={self.config.lora.r}"
        draw_loss_curve(read_metrics(self.folder / "metrics.jsonl"), self.folder / "loss_curve.png", title)
        predictions = getattr(trainer, "predictions", None)
        if self.task.problem == "single_label" and predictions is not None and self.task.labels:
            guesses = predictions.predictions.argmax(-1)
            from lorakeet.tasks.plots import draw_confusion  # which loads matplotlib

            draw_confusion(predictions.label_ids, guesses, self.task.labels, self.folder / "confusion.png")
        write_json(self.folder / "summary.json", summary)
        for line in compared(summary):
            info(line)
