"""The part of the Trainer that saves and restores its state, in safetensors and JSON and without pickles.

A checkpoint has ``optimizer``, ``scheduler``, ``scaler`` (fp16 only) and one ``process_N`` for each process, see
:mod:`lorakeet.train.checkpoints.state_files`. With DeepSpeed or FSDP the engine's own files hold optimizer and scaler.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import EarlyStoppingCallback, ExportableState

from lorakeet.errors import TrainingError
from lorakeet.files import PICKLE_SUFFIXES
from lorakeet.log import warn
from lorakeet.rng import random_state, set_random_state
from lorakeet.security.paths import is_file, matching
from lorakeet.train.checkpoints.manifest import checkpoints
from lorakeet.train.checkpoints.state_files import read_state, write_state


class SavedState(transformers.Trainer):
    """Trainer that writes and reads no pickle, and restores the state of its callbacks."""

    any_checkpoint = False

    @property
    def _has_engine(self) -> bool:
        """Whether DeepSpeed or FSDP of the parent saves the optimizer in files of its own."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    # ---- saving -----------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # the parent's pickle of its arguments is read nowhere and could carry code
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._has_engine:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            optimizer = {"parameters": self._optimized(), "state": self.optimizer.state_dict()}
            write_state(Path(output_dir), "optimizer", optimizer)
            write_state(Path(output_dir), "scheduler", self.lr_scheduler.state_dict())

    def _save_scaler(self, output_dir: str) -> None:
        if self.args.should_save and (scaler := getattr(self.accelerator, "scaler", None)) is not None:
            write_state(Path(output_dir), "scaler", scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        """Write what each process has for itself: its random state, and its loss that is not logged yet."""
        loss = self._tr_loss.item() if hasattr(self, "_tr_loss") else 0.0
        state = {"random": random_state(), "loss": loss}
        write_state(Path(output_dir), f"process_{self.args.process_index}", state)

    def _optimized(self) -> list[list[str]]:
        """Return the names of the parameters in each group of the optimizer."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [[names.get(id(p), "") for p in group["params"]] for group in self.optimizer.param_groups]

    def _export_callbacks(self) -> None:
        """Put the state of the callbacks into the Trainer's state."""
        states: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: kept[0] if len(kept) == 1 else kept for name, kept in states.items()}

    # ---- restoring --------------------------------------------------------------------------------------------

    def _check_parts(self, folder: Path) -> None:
        """Refuse a checkpoint with pickles or without the whole state; with ``any_checkpoint`` only warn."""
        pickles = sorted(path.name for path in matching(folder, "*") if path.suffix in PICKLE_SUFFIXES)
        if pickles and not self._has_engine:
            message = f"checkpoint {folder} holds pickles, which can run code: {', '.join(pickles)}"
            if not self.any_checkpoint:
                hint = "start again, or continue from its adapter: --init-adapter, in Python PeftModel.from_pretrained"
                raise TrainingError(f"{message}, expected safetensors and JSON", hint)
            warn(f"{message}; they are not read")
        missing = self._missing_parts(folder)
        message = f"checkpoint {folder} does not hold {', '.join(missing)}, so these would begin afresh"
        if missing and not (self.any_checkpoint and is_file(folder / TRAINER_STATE_NAME)):
            raise TrainingError(
                f"{message} (was it saved with save_only_model=True?)",
                "resume from a whole checkpoint, or pass Trainer(..., any_checkpoint=True) to begin them afresh",
            )
        if missing:
            warn(message)
        if self.args.ignore_data_skip:
            warn("ignore_data_skip=True: the resumed run reads the data from its first sample again")

    def _missing_parts(self, folder: Path) -> list[str]:
        """Return the states that a resumed run would begin afresh, since the checkpoint has no file of them."""
        parts = {TRAINER_STATE_NAME: "number of steps"}
        if not self._has_engine:
            parts |= {"optimizer.json": "optimizer", "scheduler.json": "learning rate schedule"}
            parts |= {"scaler.json": "loss scale"} if self.args.fp16 else {}
        states = dict.fromkeys((f"process_{i}.json" for i in range(self.args.world_size)), "random state")
        missing = [state for file, state in {**parts, **states}.items() if not is_file(folder / file)]
        return list(dict.fromkeys(missing))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._has_engine:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        if is_file(folder / "optimizer.json"):
            saved = read_state(folder, "optimizer")
            if saved["parameters"] != self._optimized():
                raise TrainingError(
                    f"the optimizer in {folder} has other parameters, or in another order, than this run",
                    "resume with the model and optimizer of the run that wrote it",
                )
            self.optimizer.load_state_dict(saved["state"])
        if is_file(folder / "scheduler.json"):
            self.lr_scheduler.load_state_dict(read_state(folder, "scheduler"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None and is_file(Path(checkpoint) / "scaler.json"):
            scaler.load_state_dict(read_state(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (state := self._process_state(Path(checkpoint))):
            set_random_state(state["random"])

    def _process_state(self, folder: Path) -> dict[str, Any] | None:
        """Return what this process wrote for itself; None if it wrote nothing."""
        name = f"process_{self.args.process_index}"
        return read_state(folder, name) if is_file(folder / f"{name}.json") else None

    def _load_callback_state(self) -> None:
        """Give each callback the counters that it had; the arguments that it was made with are those of this run."""
        if self.args.restore_callback_states_from_checkpoint:
            super()._load_callback_state()
            return
        mine = [each for each in self.callback_handler.callbacks if isinstance(each, ExportableState)]
        for name, saved in self.state.stateful_callbacks.items():
            same = [callback for callback in mine if type(callback).__name__ == name]
            for callback, state in zip(same, saved if isinstance(saved, list) else [saved], strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, resume: Any, trial: Any) -> Any:
        """Restore counters; a training that has ended is not trained any further, which the parent would do."""
        position = super()._init_training_state(max_steps, per_epoch, epochs, resume, trial)
        best = checkpoints(self.args.output_dir).get(self.state.best_global_step or 0)
        if resume is not None and best is not None:  # also in a folder that was moved
            self.state.best_model_checkpoint = str(best)
        if resume is not None and self._has_ended(max_steps):
            self._load_rng_state(resume)
            return epochs, 0
        return position

    def _has_ended(self, max_steps: int) -> bool:
        """Whether the training that wrote the restored state took its last step."""
        stops = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        return self.state.global_step >= max_steps or any(
            each.early_stopping_patience_counter >= each.early_stopping_patience for each in stops
        )
