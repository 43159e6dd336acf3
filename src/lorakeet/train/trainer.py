"""``transformers.Trainer`` with the silent failures taken out.

Same constructor, same TrainingArguments, any transformers model; with a Lorakeet model checkpoints hold the adapter
alone. What differs from the parent:

- checkpoints are whole or absent, a resumed run equals an uninterrupted one bit for bit on the same machine, and a
  checkpoint of another run is refused (:mod:`lorakeet.train.checkpoint`);
- the loss is per real target token over the whole optimizer step, for models that do not count tokens themselves too;
- micro-batches of one step may run as one pass (:mod:`lorakeet.train.microbatch_packing`);
- held-out loss is per target token, and evaluating never touches the random numbers of training;
- saving, evaluating, gradients, synchronisation and finiteness are checked (:mod:`lorakeet.train.preflight`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.errors import TrainingError
from lorakeet.files import check_output, write_folder
from lorakeet.log import info
from lorakeet.patches.causal_loss import count_targets, shifts_labels
from lorakeet.patches.fused_loss import fused_sample_losses
from lorakeet.rng import same_random_state
from lorakeet.tasks.metrics import loss_and_perplexity
from lorakeet.train import checkpoint, preflight
from lorakeet.train.length_sampler import LengthWindows
from lorakeet.train.loraplus import LoraPlus
from lorakeet.train.microbatch_packing import Batch, Passes, why_separate
from lorakeet.train.step_callback import Steps


class Trainer(transformers.Trainer):
    """Trains a model, or the adapter in it.

    Args:
        model, args, and all others: as ``transformers.Trainer``.
        non_finite: What to do when a loss or gradient is not finite: ``"stop"`` saves the last good state as a
            checkpoint and raises; ``"skip"`` drops the step, says so and goes on.
        any_checkpoint: Resume even from a checkpoint whose settings, data or number of processes differ.
        token_budget: Real tokens of a pass that several micro-batches of an optimizer step may share; None or 0: each
            runs on its own. They are joined inside of :func:`lorakeet.patches.padding_free.padding_free`, a language
            model's inside of :func:`lorakeet.patches.fused_loss.fused_loss` too; whether they are is said.
        loraplus: B learns faster than A (:mod:`lorakeet.train.loraplus`); a number is the ratio.

    Raises:
        TrainingError: fp16 on a CPU, parameters that would learn in fp16, or LoRA+ beside an optimizer that is given.
    """

    control: Any
    data_collator: Any
    model_accepts_loss_kwargs: bool

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        non_finite: Literal["stop", "skip"] = "stop",
        any_checkpoint: bool = False,
        token_budget: int | None = None,
        loraplus: LoraPlus | float | None = None,
        **settings: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args
        if model is not None:
            preflight.check_precision(model, args)
        preflight.say_device(args)
        super().__init__(model, args, *rest, **settings)
        self.non_finite, self.any_checkpoint = non_finite, any_checkpoint
        self.loraplus = LoraPlus(loraplus) if isinstance(loraplus, (int, float)) else loraplus
        if self.loraplus and self.optimizer is not None:
            raise TrainingError(
                "an optimizer is given and LoRA+ asked for: both say who learns at which rate", "leave one of them out"
            )
        # Left to itself the order of samples follows whatever seeded torch last, not the seed of the run.
        self.accelerator.dataloader_config.data_seed = args.seed if args.data_seed is None else args.data_seed
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # the parent's loop updates it
        self._shifts_labels = shifts_labels(self.model)
        self._counts_known = False
        self._passes = Passes(self, token_budget)
        self._losses: list[tuple[Tensor, list[Batch]]] = []  # of the passes of the step at hand
        self._targets: Any = None  # of the step at hand
        self._grad_norm: Any = None
        self._resumed: dict[str, Any] | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._collator: checkpoint.SteadyCollator | None = None
        self.add_callback(Steps(self))

    # ---- data -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """As the parent's, with a collator whose random numbers depend on seed, epoch and samples alone.

        Where the data has a column of lengths, the samples of each optimizer step are put in order of length.
        """
        given = self.data_collator
        self.data_collator = self._collator = checkpoint.SteadyCollator(given, self.args.seed)
        try:
            loader: Any = super().get_train_dataloader()
        finally:
            self.data_collator = given
        column = self.args.length_column_name
        if isinstance(self.train_dataset, datasets.Dataset) and column in self.train_dataset.column_names:
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            loader.set_sampler(LengthWindows(loader.get_sampler(), self.train_dataset[column][:], size))
        return loader

    # ---- optimizer --------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As the parent's; with LoRA+ its parameter groups are split by learning rate."""
        is_new = self.optimizer is None
        made: Optimizer = super().create_optimizer(*([] if model is None else [model]))
        if is_new and self.loraplus:
            self.loraplus.split_(made, self.model if model is None else model, self.args.learning_rate)
        return made

    # ---- loss -------------------------------------------------------------------------------------------------

    @property
    def _models_own_loss(self) -> bool:
        """Whether the loss is the one that the model returns, and not one made here from its outputs."""
        return self.compute_loss_func is None and self.label_smoother is None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Targets of the whole optimizer step, over all micro-batches and processes; for any model."""
        if not batch_samples or not self._models_own_loss:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(sum(count_targets(batch, self._shifts_labels) for batch in batch_samples), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return count

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """As the parent's; and which of the step's micro-batches will share a pass."""
        batches, self._targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._passes.plan_groups(batches)
        return batches, self._targets

    @property
    def token_budget(self) -> int:
        """Real tokens of a pass that several micro-batches may share; 0: none may."""
        return self._passes.budget

    def why_separate(self) -> str | None:
        """Why the micro-batches of a step may not share a pass, in half a sentence; None if they may."""
        return why_separate(self)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; remembers loss and batches until the optimizer has applied the step.

        A micro-batch that waits for others has the loss 0; the pass that they share has that of all.
        """
        if not self._counts_known:
            self._find_out_who_counts(inputs)
        batches = self._passes.take(inputs)
        if not batches:
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, self._passes.join(batches), num_items_in_batch)
        self._losses.append((loss, batches))
        return loss

    def _find_out_who_counts(self, inputs: dict[str, Any]) -> None:
        """Whether to pass the step's targets to the model, which most forwards accept and some ignore."""
        alone = self.args.gradient_accumulation_steps == 1 and self.args.world_size == 1
        if self.model_accepts_loss_kwargs and self._models_own_loss and not alone:
            batch = self._prepare_inputs(inputs)
            with same_random_state(), self.accelerator.autocast():
                self.model_accepts_loss_kwargs = preflight.divides_by_count(self.model, batch)
        self._counts_known = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; a mean over a micro-batch is weighed by its share of the step's targets."""
        if not model.training or self.model_accepts_loss_kwargs or not self._models_own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = count_targets(inputs, self._shifts_labels)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if not targets:  # 0/0; but the graph must stay whole, or the other processes wait for these gradients
            others = [value for value in outputs.values() if torch.is_tensor(value) and value is not loss]
            loss = sum(value.sum() * 0 for value in others) if others else loss
        loss = loss * self.share(targets, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def share(self, targets: int, of: Any) -> Any:
        """What to weigh a micro-batch's mean with, so that the step's loss is the mean over all of its targets.

        The parent divides by the micro-batches afterwards, and DDP by the processes.
        """
        processes = self.args.world_size if self.args.average_tokens_across_devices else 1
        return targets / of * self.current_gradient_accumulation_steps * processes

    # ---- evaluation -------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """For causal language models without ``compute_metrics``: the mean over all target tokens, and perplexity."""
        only_loss = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        with same_random_state():
            if not (only_loss and self._shifts_labels and self._models_own_loss):
                return super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            return self._token_loop(dataloader, metric_key_prefix)

    @torch.no_grad()
    def _token_loop(self, dataloader: Any, prefix: str) -> EvalLoopOutput:
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        total, tokens, samples = 0.0, 0, 0
        for batches in self._passes.of_an_evaluation(dataloader):
            with self.accelerator.autocast():
                losses, targets = fused_sample_losses(model, self._prepare_inputs(self._passes.join(batches)))
            if self.accelerator.num_processes > 1:  # without the rows that even out processes
                losses, targets = self.accelerator.gather_for_metrics((losses, targets))
            total += float(losses.cpu().double().sum())
            tokens += int(targets.sum())
            samples += len(targets)
            for _ in batches:
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        figures = {f"{prefix}_{name}": value for name, value in loss_and_perplexity(total, tokens).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=figures, num_samples=samples)

    def rehearse(self) -> None:
        """Before the first step: is there room to save, can the adapter be saved, does an evaluation fit into memory?

        Raises:
            OutputError: the output folder cannot be written, or has no room for a checkpoint.
        """
        if self.args.should_save and self.args.save_strategy != "no":
            check_output(self.args.output_dir, preflight.checkpoint_bytes(self.model))
            checkpoint.clear_aside(Path(self.args.output_dir))
            if isinstance(self.model, PeftModel):
                preflight.rehearse_save(self.model, self.args.output_dir)
        if self.args.eval_strategy != "no":
            sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            with same_random_state():
                for dataset in sets:
                    self._rehearse_evaluation(dataset)

    @torch.no_grad()
    def _rehearse_evaluation(self, dataset: Any) -> None:
        """One batch of the longest samples, as the evaluation will run it."""
        if not (isinstance(dataset, datasets.Dataset) and "input_ids" in dataset.column_names):
            return
        lengths = [len(ids) for ids in dataset["input_ids"]]
        longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-self.args.eval_batch_size :]
        rows = self._remove_unused_columns(dataset.select(longest), description="rehearsal")
        batch = self.data_collator([rows[i] for i in range(len(rows))])
        self.model.eval()
        with self.accelerator.autocast():
            if self.compute_metrics is None and self._shifts_labels and self._models_own_loss:
                fused_sample_losses(self.model, self._prepare_inputs(batch))
            else:
                self.prediction_step(self.model, batch, prediction_loss_only=self.compute_metrics is None)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes from it."""
        if self._fingerprint is None:
            self._fingerprint = checkpoint.run_fingerprint(self.args, self.model, self.train_dataset)
            if self.token_budget:
                self._fingerprint["token_budget"] = str(self.token_budget)
            if self.loraplus:
                self._fingerprint |= {f"loraplus_{name}": str(value) for name, value in asdict(self.loraplus).items()}
        return self._fingerprint

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # The parent leaves a pickle of its arguments, which nobody reads and which could carry code.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Everything needed to go on, written aside by all processes and put in place by one."""
        run_folder = Path(self._get_output_dir(trial))
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        if self.state.best_global_step:
            best = run_folder / f"checkpoint-{self.state.best_global_step}"
            if best == folder or best.exists():
                self.state.best_model_checkpoint = str(best)
        progress = self._progress()
        with write_folder(folder) if self.args.should_save else nullcontext() as made:
            aside = Path(broadcast_object_list([str(made)])[0])
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
                checkpoint.write_manifest(aside, self.fingerprint(), progress)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _export_callbacks(self) -> None:
        states: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: kept[0] if len(kept) == 1 else kept for name, kept in states.items()}

    def _progress(self) -> dict[str, float]:
        """Losses not yet logged, which the parent forgets between one session and the next."""
        if not hasattr(self, "_tr_loss"):
            return {}
        unlogged = self.accelerator.gather(self._tr_loss[None]).mean().item()
        return {"unlogged": unlogged, "logged": self._total_loss_scalar, "last_logged": self._globalstep_last_logged}

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._grad_norm

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **settings: Any) -> TrainOutput:
        """Train, or go on from a checkpoint: a folder, or True for the newest whole one in ``args.output_dir``.

        Raises:
            TrainingError: there is no whole checkpoint or it comes from another run; a parameter got no gradient; a
                loss or gradient was not finite; processes were not synchronised.
            OutputError: the output folder cannot be written or has no room.
        """
        self._resumed = None
        folder = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, (str, Path)) else None
        if resume_from_checkpoint is True:
            folder = checkpoint.latest_checkpoint(self.args.output_dir)
            if folder is None:
                raise TrainingError(f"no whole checkpoint in {self.args.output_dir}", "start without resuming")
        if folder is not None:
            if not self.any_checkpoint:
                checkpoint.refuse_other_run(folder, self.fingerprint())
            if not self.any_checkpoint or (folder / checkpoint.MANIFEST).exists():  # the parent's have none
                self._resumed = checkpoint.read_manifest(folder)["progress"]
        return super().train(str(folder) if folder else None, *rest, **settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            model.load_adapter(resume_from_checkpoint, model.active_adapters[0], is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            info(f"taking the best adapter, of {self.state.best_model_checkpoint}")
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
