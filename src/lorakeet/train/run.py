"""A complete run: from settings to an adapter, its figures and its loss curve, all in one folder.

The folder holds ``run.yaml`` (complete; alone repeats the run), ``metrics.jsonl``, ``summary.json``,
``loss_curve.png``, ``adapter/`` and, if any are saved, ``checkpoints/``. Nothing else is written but the cache.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, TrainingArguments, set_seed

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.adapter.serialization import add_notes
from lorakeet.base.architectures import AUTO_CLASSES
from lorakeet.base.device_dtype import choose_device
from lorakeet.base.load import Base, inspect_model, load_base
from lorakeet.base.quiet import quiet
from lorakeet.config import RunConfig, TaskSettings
from lorakeet.data.collate import make_collator
from lorakeet.data.encode.render import describe_sample
from lorakeet.data.prepare import prepare
from lorakeet.data.prepared import Prepared
from lorakeet.errors import OutputError, TrainingError
from lorakeet.files import write_elsewhere, write_folder, write_json
from lorakeet.log import info, log, warn
from lorakeet.patches.gradient_checkpointing import gradient_checkpointing
from lorakeet.patches.of_training import training_patches
from lorakeet.plan.free_memory import free_memory
from lorakeet.plan.plan import Plan, compare, step_seconds
from lorakeet.runs.metrics_log import MetricsLog
from lorakeet.runs.run_folder import check_run_folder, claim_folder, is_run, refuse_other_settings
from lorakeet.tasks.setup import check_rank, task_settings, with_length
from lorakeet.tasks.task import Task
from lorakeet.tasks.taught import NOTES, taught_notes
from lorakeet.train.arguments import training_arguments
from lorakeet.train.callbacks.interrupt import StopAfterStep, resume_command
from lorakeet.train.callbacks.progress import ProgressCallback
from lorakeet.train.checkpoints.manifest import latest_checkpoint
from lorakeet.train.evaluate import longest_first
from lorakeet.train.init_adapter import fit_base, loading_options, put_adapter, tokenizer_and_limits, with_init_adapter
from lorakeet.train.loraplus import LoraPlus
from lorakeet.train.microbatch_packing import default_token_budget
from lorakeet.train.planning.at_start import plan_at_start, same_in_all_processes
from lorakeet.train.preflight import checkpoint_bytes
from lorakeet.train.summary import Progress, compare_figures, report_outcome, samples_seen, summarize
from lorakeet.train.task_trainer import TaskTrainer
from lorakeet.train.trainer import Trainer

__all__ = ["InterruptedRunError", "Run", "check_run_folder", "run_training"]


#: Bytes of a run's small files at most: figures, plots, settings, model card. Measured: 0.2 MB for 200 steps.
FIGURES_BYTES = 300_000


class InterruptedRunError(TrainingError):
    """A person or the machine stopped the run; it can be resumed."""

    exit_code = 130  # the shell's code of a program that was interrupted


def run_training(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, any_checkpoint: bool = False
) -> dict[str, Any]:
    """Train an adapter as ``config`` says.

    Under torchrun or accelerate every process calls this; only the main process writes and logs.

    Args:
        config: All settings. ``config.out`` is the run's folder.
        resume: Resume from the newest complete checkpoint (from the start, if there is none yet).
        overwrite: Replace a run in the folder.
        any_checkpoint: Resume even if settings, data or number of processes differ.

    Returns:
        The contents of ``summary.json``.

    Raises:
        OutputError: The folder cannot be written to, holds a run already, or holds no run to resume.
        DataError, BaseModelError, TargetError, ConfigError: See the rooms that raise them; nothing is written then.
        InterruptedRunError: Ctrl-C or SIGTERM; a checkpoint is saved, and the hint tells how to resume.
        TrainingError: The run must stop, see :class:`lorakeet.train.trainer.Trainer`.
    """
    began = time.perf_counter()
    if int(os.environ.get("RANK", "0")) > 0:
        log.setLevel("ERROR")
    folder = Path(config.out)
    check_run_folder(folder, resume=resume, overwrite=overwrite)
    config = with_init_adapter(config)
    if resume and not any_checkpoint and is_run(folder):
        refuse_other_settings(config, folder)
    model_info = inspect_model(config.base)
    chosen = task_settings(config, model_info)
    check_rank(config, model_info, Task(chosen.type), free_memory)
    (state := PartialState()).wait_for_everyone()  # no process writes to the folder before all have checked it
    with state.main_process_first():  # damaged data is reported before a base of many gigabytes is read
        tokenizer, limits = tokenizer_and_limits(config, model_info)
        data = prepare(config.data, chosen, tokenizer, seed=config.train.seed, **limits)
    config = with_length(config, data.report.train_samples, state.num_processes)
    task = Task(chosen.type, data.problem, data.labels)
    plan = plan_at_start(config, model_info, chosen, data, free_memory(choose_device(config.base.device)))
    options = loading_options(config, task)
    base = fit_base(config, load_base(config.base, auto_class=AUTO_CLASSES[task.name], for_training=True, **options))
    info(f"base       {base.describe()}")
    args = training_arguments(config, base)
    args.eval_strategy = "no" if data.held_out is None else args.eval_strategy
    set_seed(config.train.seed)
    model = put_adapter(config, base, task)
    run = Run(config, folder, base, model, data, chosen, task, args, began, plan)
    run.announce()
    if args.process_index == 0:
        claim_folder(folder, config, resume=resume, need=run.bytes_to_write(resume))
    with quiet(), StopAfterStep() as stop:
        return run.train(stop, resume, any_checkpoint)


@dataclass
class Run:
    """Everything that a run works with, checked and loaded."""

    config: RunConfig
    folder: Path
    base: Base
    model: PeftModel
    data: Prepared
    chosen: TaskSettings
    task: Task
    args: TrainingArguments
    began: float
    plan: Plan | None = None

    @property
    def loraplus(self) -> LoraPlus | None:
        """Learning rates of LoRA+; None: plain LoRA."""
        train = self.config.train
        return None if train.loraplus_ratio is None else LoraPlus(train.loraplus_ratio, train.loraplus_lr_embedding)

    def announce(self) -> None:
        """Log what the run will do."""
        trainable, total = self.model.get_nb_trainable_parameters()
        train, lora, world = self.config.train, self.config.lora, self.args.world_size
        per_step = train.batch_size * train.grad_accum * world
        rows = self.data.report.train_samples
        assert train.lr  # chosen by the data where it was left out
        steps = train.steps or -(-rows * (train.epochs or 1) // per_step)
        processes = f" x {world} processes" if world > 1 else ""
        length = f"{steps:.0f} steps of {per_step} samples ({train.batch_size} x {train.grad_accum}{processes})"
        info(f"adapter    r={lora.r}, alpha={lora.lora_alpha:g}: {trainable:,} of {total:,} parameters are trainable")
        for line in self.data.report.lines():
            info(line)
        epochs = f", {steps * per_step / rows:.2g} epochs" if rows else ""
        info(f"training   {length}{epochs}, peak learning rate {train.lr:g}")
        if plus := self.loraplus:
            _, embeddings, faster = plus.rates(train.lr)
            info(f"LoRA+      peak learning rate of B {faster:g}, of pairs on embeddings {embeddings:g}")
        task, first = self.task, next(iter(self.data.train))
        colour = sys.stderr.isatty()
        info(f"a sample   {describe_sample(self.base.tokenizer, first, task.name, task.labels, colour=colour)}")
        if train.warmup >= steps:
            warn(f"warm-up takes {train.warmup} of {steps:.0f} steps: the learning rate never reaches its peak")

    def train(self, stop: StopAfterStep, resume: bool, any_checkpoint: bool) -> dict[str, Any]:
        """Measure, train, write the adapter, measure again, then write its figures, plots and summary."""
        progress = ProgressCallback(self.folder / "metrics.jsonl")
        trainer = self._trainer([progress, stop], any_checkpoint)
        with ExitStack() as patches:
            patches.enter_context(training_patches(self.model, self.config.train))
            patches.enter_context(self._with_checkpointing(trainer))
            self._fit(trainer, progress, stop, resume, any_checkpoint)
            self._save()  # before anything else can fail
            self._measure(trainer, trainer.state.global_step, progress.log)
        summary = self._summary(trainer, progress)
        if self.args.process_index == 0:
            add_notes(self.folder / "adapter", self.model.peft_config["default"], _notes(summary))
            self._finish(trainer, summary, progress.log.read())
        trainer.accelerator.wait_for_everyone()
        report_outcome(summary)
        return summary

    def bytes_to_write(self, resume: bool) -> int:
        """Return the disk space that the run needs: the adapter with its tokenizer, figures, and checkpoints.

        Args:
            resume: Whether the checkpoints of an earlier session are there already; they are replaced.
        """
        checkpoints = 0 if self.config.train.save_every is None else 1 if resume else self.args.save_total_limit + 1
        backend = getattr(self.base.tokenizer, "backend_tokenizer", None)
        tokenizer = len(backend.to_str().encode()) if backend is not None else 0
        adapter = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return adapter + tokenizer + FIGURES_BYTES + checkpoints * checkpoint_bytes(self.model)

    def _with_checkpointing(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """Return the context in which layers are checkpointed: as set, or as memory needs."""
        every: bool | int | str | None = self.config.train.gradient_checkpointing
        if every == "auto":
            every = same_in_all_processes(self.plan, trainer.accelerator)
        return gradient_checkpointing(self.model, int(every)) if every else nullcontext()

    def _fit(
        self, trainer: Trainer, progress: ProgressCallback, stop: StopAfterStep, resume: bool, any_checkpoint: bool
    ) -> None:
        """Measure the base, then train.

        Raises:
            InterruptedRunError: The run was stopped; a checkpoint is saved.
        """
        start = latest_checkpoint(self.args.output_dir) if resume else None
        if resume:
            info(f"resuming from {start}" if start else "no complete checkpoint yet: starting from the beginning")
        try:
            if start is None:
                self._measure(trainer, 0, progress.log)
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        except OutputError as error:  # a checkpoint that does not fit
            raise self._rescue(error) if trainer.state.global_step else error from error
        finally:
            progress.close()
        if stop.stopped:
            raise InterruptedRunError(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, a checkpoint is saved",
                f"resume with: {resume_command(self.folder / 'run.yaml')}",
            )

    def _trainer(self, callbacks: list[Any], any_checkpoint: bool) -> Trainer:
        train, data = self.config.train, self.data
        budget = train.token_budget
        if budget is None:
            micro_batch = train.batch_size * self.config.data.max_length
            budget = default_token_budget(self.model, self.args.device, micro_batch)
        settings: dict[str, Any] = {
            "model": self.model,
            "args": self.args,
            "train_dataset": data.train,
            "eval_dataset": None if data.held_out is None else longest_first(data.held_out),
            "data_collator": make_collator(self.chosen, self.base.tokenizer, self.model),
            "processing_class": self.base.tokenizer,
            "callbacks": callbacks,
            "any_checkpoint": any_checkpoint,
            "non_finite": train.non_finite,
            "token_budget": budget,
            "loraplus": self.loraplus,
        }
        if self.task.name == "CAUSAL_LM":
            trainer = Trainer(**settings)
        else:
            trainer = TaskTrainer(**settings, task=self.task, answers=data.rows)
        trainer.remove_callback(PrinterCallback)  # prints to stdout
        return trainer

    def _measure(self, trainer: Trainer, step: int, metrics: MetricsLog) -> None:
        """Measure the held-out figures at this step, unless the main process has them already."""
        if self.data.held_out is None:
            return
        known = any(line["step"] == step and "eval_loss" in line for line in metrics.read())
        if not broadcast_object_list([known])[0]:
            trainer.evaluate()

    def _summary(self, trainer: Trainer, progress: ProgressCallback) -> dict[str, Any]:
        """Return the contents of ``summary.json``."""
        train, report, steps = self.config.train, self.data.report, trainer.state.global_step
        per_step = train.batch_size * train.grad_accum * self.args.world_size
        done = Progress(
            steps=steps,
            samples=samples_seen(steps, report.train_samples, per_step),
            tokens=trainer.state.num_input_tokens_seen,
            train_seconds=progress.seconds,
            wall_seconds=progress.earlier_seconds + time.perf_counter() - self.began,
        )
        settings = {
            "bits": self.config.base.bits,
            "device": str(self.args.device),
            "processes": self.args.world_size,
            "seed": train.seed,
        }
        lines = progress.log.read()
        found = summarize(self.folder, self.base, self.model, self.task, self.data, done, settings, lines)
        peak = found["peak_device_bytes"] or found["peak_rss_bytes"]
        return found | compare(self.plan, peak, step_seconds(lines))

    def _save(self) -> None:
        """Write the adapter, complete or not at all; elsewhere, if the run's folder has no room.

        Raises:
            OutputError: The run's folder has no room; the message says where the adapter is.
        """
        if self.args.process_index == 0:
            try:
                with write_folder(self.folder / "adapter") as aside:
                    self._write_adapter(aside)
            except OutputError as error:
                raise self._rescue(error) from error
            info(f"adapter    {self.folder / 'adapter'}")

    def _write_adapter(self, folder: Path) -> None:
        """Write the adapter with its tokenizer and chat template."""
        taught = taught_notes(self.config, self.data.layout, self.data.chat)
        origin = {"task": self.task.notes(), "data": self.data.report.content_hash, NOTES: taught}
        self.model.save_pretrained(folder, notes=origin)
        self.base.tokenizer.save_pretrained(folder)

    def _rescue(self, error: OutputError) -> OutputError:
        """Write the adapter where there is room; return the error that says where it is."""
        place = write_elsewhere(self.folder.resolve().name, self._write_adapter)
        if place is None:
            return OutputError(f"{error.message}, and there is no room elsewhere: the adapter is lost", error.hint)
        return OutputError(
            f"{error.message}; what was learned is saved in {place}",
            f"free some space, then move it: mv {place} {self.folder / 'adapter'}",
        )

    def _finish(self, trainer: Trainer, summary: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        """Write the plots and the summary, and log the figures."""
        from lorakeet.tasks.plots import draw_confusion, draw_loss_curve  # which load matplotlib

        checkpoints = Path(self.args.output_dir)
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()
        title = f"{self.base.name}, r={self.config.lora.r}"
        draw_loss_curve(lines, self.folder / "loss_curve.png", title)
        predictions = getattr(trainer, "predictions", None)
        if self.task.problem == "single_label" and predictions is not None and self.task.labels:
            best = predictions.predictions.argmax(-1)
            draw_confusion(predictions.label_ids, best, self.task.labels, self.folder / "confusion.png")
        write_json(self.folder / "summary.json", summary)
        for line in compare_figures(summary):
            info(line)


def _notes(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures for the adapter's notes: not the path on this machine, nor what the notes have already."""
    return {key: value for key, value in summary.items() if key not in ("adapter_path", "task", "data")}
