"""A whole run: from settings to an adapter, its figures and its picture, all in one folder.

The folder holds ``run.yaml`` (complete; alone repeats the run), ``metrics.jsonl``, ``summary.json``,
``loss_curve.png``, ``adapter/`` and, where there are any, ``checkpoints/``. Nothing is written elsewhere but the cache.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import PrinterCallback, TrainingArguments, set_seed

from lorakeet._version import __version__
from lorakeet.adapter.model import PeftModel, get_peft_model
from lorakeet.base.load import Base, load_base
from lorakeet.base.quiet import quiet
from lorakeet.config import RunConfig
from lorakeet.data.collate import PaddingCollator
from lorakeet.data.prepare import Prepared, prepare
from lorakeet.data.show import show_sample
from lorakeet.data.sources import read_rows
from lorakeet.errors import TrainingError
from lorakeet.files import write_folder, write_json
from lorakeet.lora.config import LoraConfig
from lorakeet.talk import log, say, warn
from lorakeet.train.checkpoint import latest_checkpoint
from lorakeet.train.folder import check_run_folder, claim_folder, refuse_other_settings
from lorakeet.train.report import Report, draw_loss_curve, first_and_last, peak_rss_bytes, read_metrics
from lorakeet.train.stop import StopAfterStep
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
    read_rows(config.data)  # broken data is told before a base of many gigabytes is read
    base = load_base(config.base, for_training=True)
    say(f"base       {base.describe()}")
    args = training_arguments(config, base)
    PartialState().wait_for_everyone()  # until every process has checked the folder, none writes to it
    with args.main_process_first(desc="preparing data"):
        limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
        data = prepare(config.data, base.tokenizer, seed=config.train.seed, max_positions=limit)
    args.eval_strategy = "no" if data.held_out is None else args.eval_strategy
    set_seed(config.train.seed)
    name = {"base_model_name_or_path": base.name, "revision": config.base.revision}
    model = get_peft_model(base.model, LoraConfig(**config.lora.model_dump(), task_type="CAUSAL_LM", **name))
    _say_plan(config, base, model, data, args)
    if args.process_index == 0:
        claim_folder(folder, config, resume=resume)
    run = Run(config, folder, base, model, data, args, began)
    with quiet(), StopAfterStep() as stop:
        return run.train(stop, resume, any_checkpoint)


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
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
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


def _say_plan(config: RunConfig, base: Base, model: PeftModel, data: Prepared, args: TrainingArguments) -> None:
    """What is about to happen, before it does."""
    trainable, every = model.get_nb_trainable_parameters()
    train = config.train
    per_step = train.batch_size * train.grad_accum * args.world_size
    steps = train.steps or -(-len(data.train) * train.epochs // per_step)
    length = f"{steps:.0f} steps of {per_step} samples ({train.batch_size} x {train.grad_accum}"
    length += f" x {args.world_size} processes)" if args.world_size > 1 else ")"
    say(f"adapter    r={config.lora.r}, alpha={config.lora.lora_alpha:g}: {trainable:,} of {every:,} parameters learn")
    for line in data.report.lines():
        say(line)
    say(f"training   {length}, {steps * per_step / len(data.train):.2g} epochs, peak learning rate {train.lr:g}")
    say(f"a sample   {show_sample(base.tokenizer, data.train[0]['input_ids'])}")
    if train.warmup >= steps:
        warn(f"the warm-up takes {train.warmup} of {steps:.0f} steps: the learning rate never reaches its peak")


@dataclass
class Run:
    """What a run works with, once everything has been checked."""

    config: RunConfig
    folder: Path
    base: Base
    model: PeftModel
    data: Prepared
    args: TrainingArguments
    began: float

    def train(self, stop: StopAfterStep, resume: bool, any_checkpoint: bool) -> dict[str, Any]:
        """Held-out loss, training, adapter, held-out loss, summary."""
        report = Report(self.folder / "metrics.jsonl")
        trainer = self._trainer([report, stop], any_checkpoint)
        start = latest_checkpoint(self.args.output_dir) if resume else None
        if resume:
            say(f"going on from {start}" if start else "no whole checkpoint yet: starting from the beginning")
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
        say(f"adapter    {self.folder / 'adapter'}")
        self._measure(trainer, trainer.state.global_step)
        summary = self._summary(trainer, report)
        self._save(trainer, summary)
        if self.args.process_index == 0:
            self._finish(summary)
        trainer.accelerator.wait_for_everyone()
        return summary

    def _trainer(self, callbacks: list[Any], any_checkpoint: bool) -> Trainer:
        held_out = self.data.held_out
        if held_out is not None:  # neighbours of one length: little padding
            lengths = held_out["length"]
            held_out = held_out.select(sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)))
        trainer = Trainer(
            model=self.model,
            args=self.args,
            train_dataset=self.data.train,
            eval_dataset=held_out,
            data_collator=PaddingCollator(self.base.tokenizer.pad_token_id),
            processing_class=self.base.tokenizer,
            callbacks=callbacks,
            any_checkpoint=any_checkpoint,
            non_finite=self.config.train.non_finite,
        )
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
                self.model.save_pretrained(aside, notes={**notes, "data": self.data.report.content_hash})
                self.base.tokenizer.save_pretrained(aside)
        trainer.accelerator.wait_for_everyone()

    def _summary(self, trainer: Trainer, report: Report) -> dict[str, Any]:
        lines = read_metrics(self.folder / "metrics.jsonl")
        measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
        first, last = first_and_last(lines)
        trainable, every = self.model.get_nb_trainable_parameters()
        tokens, steps = trainer.state.num_input_tokens_seen, trainer.state.global_step
        return {
            "base_model": self.base.name,
            "steps": steps,
            "samples": self._samples_seen(steps),
            "tokens": tokens,
            "train_loss_first": first,
            "train_loss_last": last,
            "eval_loss_before": measured[0] if measured else None,
            "eval_loss_after": measured[-1] if measured else None,
            "eval_tokens": self.data.report.held_out_targets,
            "tokens_per_second": tokens / report.seconds if report.seconds else None,
            "train_seconds": report.seconds,
            "wall_seconds": time.perf_counter() - self.began,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if self.args.device.type == "cuda" else None,
            "trainable_parameters": trainable,
            "all_parameters": every,
            "adapter_path": str(self.folder / "adapter"),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "device": str(self.args.device),
            "processes": self.args.world_size,
            "seed": self.config.train.seed,
            "lora": self.model.peft_config["default"].model_dump(
                mode="json", include={"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias"}
            ),
            "data": asdict(self.data.report),
            "versions": {
                "python": platform.python_version(),
                "lorakeet": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _samples_seen(self, steps: int) -> int:
        """Samples learned from, each pass over the data counted again; the last step of a pass may be smaller."""
        rows = len(self.data.train)
        per_step = self.config.train.batch_size * self.config.train.grad_accum * self.args.world_size
        passes, rest = divmod(steps, -(-rows // per_step))
        return passes * rows + min(rest * per_step, rows)

    def _finish(self, summary: dict[str, Any]) -> None:
        checkpoints = Path(self.args.output_dir)
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()
        title = f"{self.base.name}, r={self.config.lora.r}"
        draw_loss_curve(read_metrics(self.folder / "metrics.jsonl"), self.folder / "loss_curve.png", title)
        write_json(self.folder / "summary.json", summary)
        if summary["eval_loss_after"] is not None:
            say(f"held-out loss {summary['eval_loss_before']:.4f} before, {summary['eval_loss_after']:.4f} after")
