"""Trainer whose checkpoints are complete or absent, and that only the run that wrote them resumes from.

A checkpoint is written to a temporary folder, flushed to disk and renamed last, so ``checkpoint-*`` is never partial.
Its manifest (:mod:`lorakeet.train.checkpoints.manifest`) lists the files with their hashes, so that damage is detected,
and the fingerprint of the run (:mod:`lorakeet.train.checkpoints.fingerprint`).
"""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.errors import OutputError, TrainingError
from lorakeet.files import check_output, check_room, clear_aside, write_folder
from lorakeet.log import info, silent, warn
from lorakeet.patches.thread_order import in_fixed_order, keep_threads
from lorakeet.security.paths import exists, is_dir, paths_below
from lorakeet.train.callbacks.interrupt import EvaluationStoppedError
from lorakeet.train.callbacks.save_by_time import SaveByTime
from lorakeet.train.checkpoints.fingerprint import refuse_other_run, run_fingerprint, versions
from lorakeet.train.checkpoints.manifest import (
    MANIFEST,
    checkpoints,
    keep_checkpoints,
    latest_checkpoint,
    read_manifest,
    remove_checkpoints,
    write_manifest,
)
from lorakeet.train.checkpoints.saved_state import SavedState
from lorakeet.train.checkpoints.state_files import read_state
from lorakeet.train.guards import preflight


class ResumableTrainer(SavedState):
    """The part of the Trainer that writes complete checkpoints and resumes from them exactly.

    Attributes:
        keep_best: Save after each evaluation with the best figure so far, and keep that checkpoint.
        save_seconds: Time that each save of this session took, in seconds.
    """

    control: Any
    keep_best = False
    _resumed: dict[str, Any] | None = None
    _fingerprint: dict[str, Any] | None = None
    _own: dict[str, Any] | None = None
    _saved_step = -1
    _evaluation_due = _saves_by_time = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.save_seconds: list[float] = []
        super().__init__(*args, **settings)

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint must share with the run that resumes from it."""
        if self._fingerprint is None:
            shared = run_fingerprint(self.args, self.model, self.train_dataset)
            self._fingerprint = {**shared, **self._further_fingerprint()}
        return self._fingerprint

    def _further_fingerprint(self) -> dict[str, str]:
        """Return settings of a subclass that change the result."""
        return {}

    # ---- saving -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint; one that the disk has no room for is left out with a warning, and the training goes on.

        Raises:
            OutputError: The disk has no room, and the run ends with this checkpoint, or other processes wait for it.
        """
        began = time.perf_counter()
        ends_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        run_folder = Path(self._get_output_dir(trial))
        error, others_wait = self._refusal(run_folder), False
        if error is None:
            try:
                self._write_checkpoint(run_folder, trial)
            except OutputError as refused:
                error, others_wait = refused, self.args.world_size > 1
        if error is not None:
            if ends_early or others_wait:
                raise error
            warn(f"{error.message}: step {self.state.global_step} has no checkpoint, and the training goes on")
        self.save_seconds.append(time.perf_counter() - began)

    def _refusal(self, run_folder: Path) -> OutputError | None:
        """Return why the disk has no room for a checkpoint, the same in all processes; None if it has."""
        found: list[OutputError | None] = [None]
        if self.args.should_save:
            try:
                check_room(run_folder, preflight.checkpoint_bytes(self.model))
            except OutputError as error:
                found = [error]
        return broadcast_object_list(found)[0]

    def _write_checkpoint(self, run_folder: Path, trial: Any) -> None:
        """Write all that resuming needs: all processes write to a temporary folder, one renames it."""
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        if self.state.best_global_step:
            best = run_folder / f"checkpoint-{self.state.best_global_step}"
            if best == folder or exists(best):
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save and is_dir(folder):  # damaged, or of another training
            remove_checkpoints([folder])
        self._write_aside(folder)
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self._remove_old_checkpoints(run_folder)

    def _remove_old_checkpoints(self, run_folder: Path) -> None:
        """Remove the checkpoints that the newest one replaces."""
        if self.args.should_save:
            best_step = self.state.best_global_step if self.state.best_model_checkpoint else None
            keep_checkpoints(run_folder, self.state.global_step, best_step, self.args.save_total_limit)

    def _write_aside(self, folder: Path) -> None:
        """Write the files of a checkpoint to a temporary folder, which becomes ``folder`` when it is whole."""
        with write_folder(folder) if self.args.should_save else nullcontext() as temporary:
            self._write_parts(Path(broadcast_object_list([str(temporary)])[0]))

    def _write_parts(self, folder: Path) -> None:
        """Write the files of a checkpoint into a folder that is there already."""
        self.save_model(str(folder), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._export_callbacks()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            progress = {
                "logged": self._total_loss_scalar,
                "last_logged": self._globalstep_last_logged,
                "evaluation_due": self._evaluation_due,
                "threads": torch.get_num_threads(),
            }
            write_manifest(folder, self.fingerprint(), versions(), progress)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *rest: Any, **more: Any
    ) -> None:
        """Log, evaluate and save where this is due; an evaluation that a signal stops is left to the resumed run."""
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **more)
        except EvaluationStoppedError:
            self._evaluation_due = self.control.should_training_stop = True
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def rehearse_saving(self) -> str | None:
        """Write a checkpoint aside, read it back and remove it; return what was done, None where none will be saved.

        Raises:
            OutputError: The output folder cannot be written, or has no space for a checkpoint.
            TrainingError, AdapterError: What was written could not be resumed from.
        """
        if not (self._saves_by_time or self.args.save_strategy != "no"):
            return None
        folder = Path(self.args.output_dir) / "rehearsal"
        if self.args.should_save:
            check_output(self.args.output_dir, preflight.checkpoint_bytes(self.model))
            clear_aside(Path(self.args.output_dir), ["checkpoint-*", folder.name])
            shutil.rmtree(folder, ignore_errors=True)
        if self._has_engine:  # its files can be written by a step only
            return None
        with silent():  # the adapter is untrained yet
            self._write_aside(folder)
        if self.args.should_save:
            try:
                self._read_back(folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return "a checkpoint, written and read back"

    def _read_back(self, folder: Path) -> None:
        """Check that a checkpoint could be resumed from, without changing the run."""
        read_manifest(folder)
        if not self.args.save_only_model:
            self._check_parts(folder)
            for name in ("optimizer", "scheduler", f"process_{self.args.process_index}"):
                read_state(folder, name)
        if isinstance(self.model, PeftModel):
            preflight.check_saved_adapters(self.model, folder)

    def save_by_time(self, minutes: float) -> None:
        """Save a checkpoint at this interval and at the end, whatever the arguments say of steps."""
        self._saves_by_time = True
        self.add_callback(SaveByTime(minutes, self.save_seconds))

    def save_last_good_state(self) -> str | None:
        """Save a checkpoint of the last step that was applied; return its folder, None if there is none."""
        step = self.state.global_step
        if step and self._saved_step != step:
            self._save_checkpoint(self.model)
        folder = checkpoints(self.args.output_dir).get(step)
        return str(folder) if folder and self._saved_step == step else None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the figures are the best so far; with :attr:`keep_best` they are saved then, at any interval."""
        is_best = bool(super()._determine_best_metric(metrics, trial))
        if is_best and self.keep_best:
            self.state.best_global_step = self.state.global_step
            self.control.should_save = True
        return is_best

    # ---- resuming ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **settings: Any) -> TrainOutput:
        """Train, or resume from a checkpoint: a folder, or True for the newest whole one in ``args.output_dir``.

        Raises:
            TrainingError: There is no complete checkpoint, or it comes from another run. A parameter got no gradient;
                a loss or gradient was not finite; gradients differ between processes.
            OutputError: The output folder cannot be written, or has no space for a checkpoint.
        """
        self._resumed, self._own, self._fingerprint, self._saved_step = None, None, None, -1
        self._evaluation_due = False
        self.save_seconds.clear()
        folder = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, (str, Path)) else None
        if resume_from_checkpoint is True:
            newest = latest_checkpoint(self.args.output_dir) if self.args.should_save else None
            folder = broadcast_object_list([newest])[0]
            if folder is None:
                raise TrainingError(f"no complete checkpoint in {self.args.output_dir}", "start without resuming")
        self.fingerprint()  # of the base as it is before it trains
        if folder is not None:
            self._check_checkpoint(folder)
        if self._resumed and "threads" in self._resumed:  # an older version did not note them
            keep_threads(self.model, self._resumed["threads"])
        with in_fixed_order(self.model):
            return super().train(str(folder) if folder else None, *rest, **settings)

    def _check_checkpoint(self, folder: Path) -> None:
        """Refuse a checkpoint that is damaged, of another run, or not whole; read the counters of its Trainer."""
        if not self.any_checkpoint:
            refuse_other_run(folder, self.fingerprint())
        if not self.any_checkpoint or exists(folder / MANIFEST):  # the parent's have none
            self._resumed = read_manifest(folder)["progress"]
        self._check_parts(folder)
        self._own = self._process_state(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            model.restore_adapters(resume_from_checkpoint)
            return
        if not self._has_engine and not any(
            path.suffix == ".safetensors" for path in paths_below(Path(resume_from_checkpoint))
        ):
            raise TrainingError(
                f"{resume_from_checkpoint} has no weights in safetensors", "resume from another checkpoint"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            info(f"loading the best adapter, from {self.state.best_model_checkpoint}")
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _restore_progress(self) -> None:
        """Restore the losses that the interrupted session had not logged, and make up for an evaluation it broke off."""
        if resumed := self._resumed:
            self._tr_loss += self._own["loss"] if self._own else 0.0
            self._total_loss_scalar = resumed["logged"]
            self._globalstep_last_logged = int(resumed["last_logged"])
            if resumed["evaluation_due"]:
                is_best = self._determine_best_metric(self._evaluate(None, None), None)
                best = checkpoints(self.args.output_dir).get(self.state.global_step)
                if is_best and best is not None:
                    self.state.best_model_checkpoint = str(best)
            run_folder = Path(self.args.output_dir)
            if self.state.global_step in list(checkpoints(run_folder))[:1]:  # a kill may have come before the removal
                self._remove_old_checkpoints(run_folder)
