"""A complete run: from settings to an adapter, its figures and its loss curve, all in one folder.

The folder holds ``run.yaml`` (complete; alone repeats the run), ``metrics.jsonl``, ``summary.json``,
``loss_curve.png``, ``adapter/`` and, if any are saved, ``checkpoints/``. Nothing else is written but the cache.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, set_seed

from lorakeet.base.architectures import AUTO_CLASSES
from lorakeet.base.device_dtype import choose_device
from lorakeet.base.load import inspect_model, load_base
from lorakeet.base.quiet import quiet
from lorakeet.config import RunConfig
from lorakeet.data.collate import make_collator
from lorakeet.data.encode.render import describe_sample
from lorakeet.data.prepare import prepare
from lorakeet.errors import OutputError, TrainingError
from lorakeet.files import not_removed
from lorakeet.log import info, log, warn
from lorakeet.lora.initialization.eva import first_batches
from lorakeet.lora.lifecycle.frozen_a import freeze_lora_a
from lorakeet.patches.gradient_checkpointing import gradient_checkpointing
from lorakeet.patches.of_training import training_patches
from lorakeet.plan.free_memory import free_memory
from lorakeet.runs.folder_lock import check_unlocked, locked
from lorakeet.runs.metrics_log import MetricsLog
from lorakeet.runs.process_memory import map_large_blocks
from lorakeet.runs.run_folder import check_run_folder, claim_folder, is_finished, is_run
from lorakeet.tasks.setup import check_rank, task_settings, with_length
from lorakeet.tasks.task import Task
from lorakeet.train.arguments import check_best, training_arguments
from lorakeet.train.callbacks.interrupt import StopAfterStep, resume_command
from lorakeet.train.callbacks.progress import ProgressCallback
from lorakeet.train.callbacks.spectrum import SpectrumCallback
from lorakeet.train.checkpoints.fingerprint import data_hash
from lorakeet.train.checkpoints.run_start import checkpoint_to_continue, finished_summary
from lorakeet.train.evaluate import longest_first
from lorakeet.train.init_adapter import fit_base, loading_options, put_adapter, tokenizer_and_limits, with_init_adapter
from lorakeet.train.loraplus import LoraPlus
from lorakeet.train.microbatch_packing import default_token_budget
from lorakeet.train.planning.at_start import plan_at_start, same_in_all_processes
from lorakeet.train.processes.agreement import check_agreement, in_any_process, settings_facts
from lorakeet.train.processes.failures import shared_failures
from lorakeet.train.processes.launch import join_processes, restarts
from lorakeet.train.processes.sharding import check_can_shard, shard_base
from lorakeet.train.run_output import RunOutput
from lorakeet.train.summary import report_outcome
from lorakeet.train.task_trainer import TaskTrainer
from lorakeet.train.trainer import Trainer

__all__ = ["InterruptedRunError", "Run", "check_run_folder", "run_training"]


class InterruptedRunError(TrainingError):
    """A person or the machine stopped the run; it can be resumed."""

    exit_code = 130  # the shell's code of a program that was interrupted


def run_training(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, any_checkpoint: bool = False
) -> dict[str, Any]:
    """Train an adapter as ``config`` says; a run of the same settings in its folder that has not finished goes on.

    Under torchrun or accelerate every process calls this; only the main process writes and logs.

    Args:
        config: All settings. ``config.out`` is the run's folder.
        resume: Expect a run to go on with; without it the newest whole checkpoint is used too, if there is one.
        overwrite: Replace a run in the folder.
        any_checkpoint: Resume even if settings, data or number of processes differ.

    Returns:
        The contents of ``summary.json``; of a run that is finished already, as they are.

    Raises:
        OutputError: The folder cannot be written to, or holds a run of other settings.
        DataError, BaseModelError, TargetError, ConfigError: See the rooms that raise them; nothing is written then.
        InterruptedRunError: Ctrl-C or SIGTERM; a checkpoint is saved, and the hint tells how to resume.
        TrainingError: The run must stop, see :class:`lorakeet.train.trainer.Trainer`.
    """
    began = time.perf_counter()
    map_large_blocks()
    if int(os.environ.get("RANK") or 0) > 0:
        log.setLevel("ERROR")
    state = join_processes(choose_device(config.base.device))
    with shared_failures():
        if in_any_process(restarts() > 0):
            resume, overwrite = True, False
        return _train_together(config, state, began, resume, overwrite, any_checkpoint)


def _train_together(
    config: RunConfig, state: PartialState, began: float, resume: bool, overwrite: bool, any_checkpoint: bool
) -> dict[str, Any]:
    """Train as :func:`run_training` says, after the processes have joined each other."""
    folder = Path(config.out)
    found = {"the run in its folder": "finished" if is_finished(folder) else "begun" if is_run(folder) else "none"}
    check_agreement({**settings_facts(config), **found})
    if state.is_main_process:
        check_unlocked(folder)
    check_run_folder(folder, resume=resume, overwrite=overwrite)
    config = with_init_adapter(config)
    if is_finished(folder) and not overwrite:
        summary = finished_summary(config, folder)
        report_outcome(summary)
        return summary
    how = {"resume": resume, "overwrite": overwrite, "any_checkpoint": any_checkpoint}
    start = checkpoint_to_continue(config, folder, **how)
    check_best(config)
    run = _load(config, folder, state, began)
    run.announce()
    with locked(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            claim_folder(folder, run.config, resume=start is not None, need=run.bytes_to_write(start is not None))
        start = broadcast_object_list([start])[0]  # by then the folder is there for all processes
        with quiet(), not_removed(folder), StopAfterStep() as stop:
            return run.train(stop, start, any_checkpoint)


def _load(config: RunConfig, folder: Path, state: PartialState, began: float) -> Run:
    """Prepare the data, load the base, and put the adapter on it; nothing is written."""
    model_info = inspect_model(config.base)
    chosen = task_settings(config, model_info)
    check_rank(config, model_info, Task(chosen.type), free_memory)
    state.wait_for_everyone()  # no process writes to the folder before all have checked it
    with state.main_process_first():  # damaged data is reported before a base of many gigabytes is read
        tokenizer, limits = tokenizer_and_limits(config, model_info)
        data = prepare(config.data, chosen, tokenizer, seed=config.train.seed, **limits)
    if state.num_processes > 1:
        check_agreement({"the data": data.report.content_hash, "the order of its samples": data_hash(data.train)})
    config = with_length(config, data.report.train_samples, state.num_processes)
    task = Task(chosen.type, data.problem, data.labels)
    plan = plan_at_start(config, model_info, chosen, data, free_memory(choose_device(config.base.device)))
    options = loading_options(config, task)
    base = fit_base(config, load_base(config.base, auto_class=AUTO_CLASSES[task.name], for_training=True, **options))
    info(f"base       {base.describe()}")
    args = training_arguments(config, base)
    args.eval_strategy = "no" if data.held_out is None else args.eval_strategy
    set_seed(config.train.seed)
    collate = partial(make_collator, chosen, base.tokenizer)
    model = put_adapter(config, base, task, lambda model: first_batches(data.train, collate(model)))
    if config.train.lorafa:
        freeze_lora_a(model)
    if config.train.fsdp:
        check_can_shard(model, state.num_processes, config.train.fsdp_size)
    return Run(config, folder, base, model, data, chosen, task, args, began, plan)


class Run(RunOutput):
    """A run that trains."""

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

    def train(self, stop: StopAfterStep, start: Path | None, any_checkpoint: bool) -> dict[str, Any]:
        """Measure, train, write the adapter, measure again, then write its figures, plots and summary."""
        progress = ProgressCallback(self.folder / "metrics.jsonl")
        spectrum = SpectrumCallback(self.model, progress.log)
        watched = [progress, stop, *([spectrum] if self.config.train.spectrum else [])]
        trainer = self._trainer(watched, any_checkpoint)
        with ExitStack() as patches:
            patches.enter_context(training_patches(self.model, self.config.train))
            patches.enter_context(self._with_checkpointing(trainer))
            if self.config.train.fsdp:  # the patches above are verified with whole weights
                shard_base(self.model, self.args.device, self.args.world_size, self.config.train.fsdp_size)
            self._fit(trainer, progress, stop, start)
            self.save_adapter()  # before anything else can fail
            self._measure_end(trainer, progress)
        if spectrum in watched and trainer.state.is_world_process_zero and not self.best_step(trainer):
            spectrum.append(trainer.state)
        summary = broadcast_object_list([self.summary(trainer, progress)])[0]  # the first process has all lines
        if self.args.process_index == 0:
            self.finish(trainer, summary, progress.log.read())
        trainer.accelerator.wait_for_everyone()
        report_outcome(summary)
        return summary

    def _with_checkpointing(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """Return the context in which layers are checkpointed: as set, or as memory needs."""
        every: bool | int | str | None = self.config.train.gradient_checkpointing
        if every == "auto":
            every = same_in_all_processes(self.plan, trainer.accelerator)
        return gradient_checkpointing(self.model, int(every)) if every else nullcontext()

    def _fit(self, trainer: Trainer, progress: ProgressCallback, stop: StopAfterStep, start: Path | None) -> None:
        """Measure the base, then train; or train on from a checkpoint.

        Raises:
            InterruptedRunError: The run was stopped; a checkpoint is saved.
        """
        try:
            if start is None:
                self._measure(trainer, 0, progress.log)
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        except OutputError as error:  # a checkpoint that does not fit
            raise self.rescue(error) if trainer.state.global_step else error from error
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
            "spike": train.spike,
            "locations": data.train_locations,
            "token_budget": budget,
            "loraplus": self.loraplus,
            "lorafa": train.lorafa,
        }
        if self.task.name == "CAUSAL_LM":
            trainer = Trainer(**settings)
        else:
            trainer = TaskTrainer(**settings, task=self.task, answers=data.rows)
        trainer.remove_callback(PrinterCallback)  # prints to stdout
        trainer.keep_best = train.keep_best or train.load_best
        if train.save_every is None and train.save_minutes:
            trainer.save_by_time(train.save_minutes)
        return trainer

    def _measure(self, trainer: Trainer, step: int, metrics: MetricsLog) -> None:
        """Measure the held-out figures at this step, unless the main process has them already."""
        if self.data.held_out is None:
            return
        known = any(line["step"] == step and "eval_loss" in line for line in metrics.read())
        if not broadcast_object_list([known])[0]:
            trainer.evaluate()

    def _measure_end(self, trainer: Trainer, progress: ProgressCallback) -> None:
        """Measure the held-out figures of the adapter that the run ends with, and the predictions that are drawn."""
        if not self.best_step(trainer):
            self._measure(trainer, trainer.state.global_step, progress.log)
        if self.task.problem == "single_label" and self.data.held_out is not None:
            unknown = self.best_step(trainer) is not None or getattr(trainer, "predictions", None) is None
            if broadcast_object_list([unknown])[0]:
                trainer.remove_callback(progress)  # the figures are in the log already
                trainer.evaluate()
