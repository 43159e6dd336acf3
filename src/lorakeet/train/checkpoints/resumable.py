"""Trainer whose checkpoints are complete or absent, and that only the run that wrote them resumes from.

A checkpoint is written to a temporary folder, flushed to disk and renamed last, so ``checkpoint-*`` is never partial.
Its ``lorakeet_checkpoint.json`` lists the files with their sizes, so that a truncated copy is detected. It also holds
the fingerprint of the run: settings that change the result, data, trainable parameters and number of processes.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.errors import OutputError, TrainingError
from lorakeet.files import check_output, write_folder
from lorakeet.log import info, warn
from lorakeet.lora.interop.trainer_hooks import missing_parts
from lorakeet.rng import same_random_state
from lorakeet.train import preflight
from lorakeet.train.checkpoints.manifest import (
    MANIFEST,
    clear_aside,
    latest_checkpoint,
    read_manifest,
    refuse_other_run,
    run_fingerprint,
    write_manifest,
)


class SteadyCollator:
    """Collator whose random numbers depend on seed, epoch and samples alone.

    A collator that masks or crops at random thus does the same in a resumed run, although batches are fetched ahead.
    Dropout does not depend on the collator.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], seed: int) -> None:
        self.collator, self.seed, self.epoch = collator, seed, 0

    def __call__(self, samples: list[Any]) -> Any:
        seed = zlib.crc32(repr((self.seed, self.epoch, samples)).encode())
        with same_random_state():
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            return self.collator(samples)


class ResumableTrainer(transformers.Trainer):
    """The part of the Trainer that writes complete checkpoints and resumes from them exactly."""

    any_checkpoint = False
    _resumed: dict[str, Any] | None = None
    _fingerprint: dict[str, Any] | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint must share with the run that resumes from it."""
        if self._fingerprint is None:
            shared = run_fingerprint(self.args, self.model, self.train_dataset)
            self._fingerprint = {**shared, **self._further_fingerprint()}
        return self._fingerprint

    def _further_fingerprint(self) -> dict[str, str]:
        """Return settings of a subclass that change the result."""
        return {}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # the parent's pickle of its arguments is read nowhere and could carry code
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint; one that the disk has no room for is left out with a warning, and the training goes on.

        Raises:
            OutputError: The disk has no room, and the run ends with this checkpoint, or other processes wait for it.
        """
        ends_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        try:
            self._write_checkpoint(trial)
        except OutputError as error:
            if ends_early or self.args.world_size > 1:
                raise
            warn(f"{error.message}: step {self.state.global_step} has no checkpoint, and the training goes on")

    def _write_checkpoint(self, trial: Any) -> None:
        """Write all that resuming needs: all processes write to a temporary folder, one renames it."""
        run_folder = Path(self._get_output_dir(trial))
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        if self.state.best_global_step:
            best = run_folder / f"checkpoint-{self.state.best_global_step}"
            if best == folder or best.exists():
                self.state.best_model_checkpoint = str(best)
        progress = self._progress()
        with write_folder(folder) if self.args.should_save else nullcontext() as temporary:
            aside = Path(broadcast_object_list([str(temporary)])[0])
            self.save_model(str(aside), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(aside))
                self._save_scaler(str(aside))
                self._save_rng_state(str(aside))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._export_callbacks()
                self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
                write_manifest(aside, self.fingerprint(), progress)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _rehearse_saving(self) -> None:
        """Check that a checkpoint fits on the disk and that the adapter can be saved."""
        if self.args.should_save and self.args.save_strategy != "no":
            check_output(self.args.output_dir, preflight.checkpoint_bytes(self.model))
            clear_aside(Path(self.args.output_dir))
            if isinstance(self.model, PeftModel):
                preflight.rehearse_save(self.model, self.args.output_dir)

    def _export_callbacks(self) -> None:
        states: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: kept[0] if len(kept) == 1 else kept for name, kept in states.items()}

    def _progress(self) -> dict[str, float]:
        """Return the losses that are not logged yet, which the parent does not save."""
        if not hasattr(self, "_tr_loss"):
            return {}
        unlogged = self.accelerator.gather(self._tr_loss[None]).mean().item()
        return {"unlogged": unlogged, "logged": self._total_loss_scalar, "last_logged": self._globalstep_last_logged}

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **settings: Any) -> TrainOutput:
        """Train, or resume from a checkpoint: a folder, or True for the newest complete one in ``args.output_dir``.

        Raises:
            TrainingError: There is no complete checkpoint, or it comes from another run. A parameter got no gradient;
                a loss or gradient was not finite; gradients differ between processes.
            OutputError: The output folder cannot be written, or has no space for a checkpoint.
        """
        self._resumed = None
        folder = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, (str, Path)) else None
        if resume_from_checkpoint is True:
            folder = latest_checkpoint(self.args.output_dir)
            if folder is None:
                raise TrainingError(f"no complete checkpoint in {self.args.output_dir}", "start without resuming")
        if folder is not None:
            if not self.any_checkpoint:
                refuse_other_run(folder, self.fingerprint())
            if not self.any_checkpoint or (folder / MANIFEST).exists():  # the parent's have none
                self._resumed = read_manifest(folder)["progress"]
            self._check_parts(folder)
        return super().train(str(folder) if folder else None, *rest, **settings)

    def _check_parts(self, folder: Path) -> None:
        """Refuse a checkpoint that does not hold the whole state; with ``any_checkpoint`` only warn."""
        missing = missing_parts(folder, self.args)
        message = f"checkpoint {folder} does not hold {', '.join(missing)}, so these would begin afresh"
        if missing and not (self.any_checkpoint and (folder / TRAINER_STATE_NAME).is_file()):
            raise TrainingError(
                f"{message} (was it saved with save_only_model=True?)",
                "resume from a whole checkpoint, or pass Trainer(..., any_checkpoint=True) to begin them afresh",
            )
        if missing:
            warn(message)
        if self.args.ignore_data_skip:
            warn("ignore_data_skip=True: the resumed run reads the data from its first sample again")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            model.restore_adapters(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            info(f"loading the best adapter, from {self.state.best_model_checkpoint}")
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def save_last_good_state(self) -> str | None:
        """Save a checkpoint of the last step that was applied; return its folder, None before the first step."""
        if not self.state.global_step:
            return None
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not folder.exists():
            self._save_checkpoint(self.model)
        return str(folder)

    def _restore_progress(self) -> None:
        """Restore the losses that the interrupted session had not logged."""
        if resumed := self._resumed:
            self._tr_loss += resumed["unlogged"]
            self._total_loss_scalar = resumed["logged"]
            self._globalstep_last_logged = int(resumed["last_logged"])
