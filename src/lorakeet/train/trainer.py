"""``transformers.Trainer`` that fails with a message where the parent fails silently.

Same constructor, same TrainingArguments, any transformers model; checkpoints of a Lorakeet model hold the adapter
alone. Differences from the parent:

- a checkpoint is complete or absent, and a checkpoint of another run is refused (:mod:`lorakeet.train.checkpoints`);
- a resumed run equals an uninterrupted one bit for bit on the same machine;
- the loss is per real target token over the whole optimizer step, also for models that do not count tokens themselves;
- micro-batches of one step may share a forward pass (:mod:`lorakeet.train.microbatch_packing`);
- held-out loss is per target token, and evaluation draws no random number from training;
- saving, evaluating, gradients, synchronization and finite values are checked (:mod:`lorakeet.train.guards`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import datasets
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from lorakeet.data.prepared import LocatedStream
from lorakeet.errors import TrainingError
from lorakeet.log import silent
from lorakeet.patches.causal_loss import count_targets, shifts_labels
from lorakeet.patches.fused_loss import fused_sample_losses
from lorakeet.patches.thread_order import in_fixed_order
from lorakeet.rng import same_random_state
from lorakeet.tasks.measure import Measure, Sums, TokenMeasure
from lorakeet.train.adalora import RankTrainer
from lorakeet.train.callbacks.step import StepCallback
from lorakeet.train.checkpoints.steady_collator import SteadyCollator
from lorakeet.train.evaluate import all_batches, held_out_sums
from lorakeet.train.guards import preflight
from lorakeet.train.guards.rehearsal import computed_tokens
from lorakeet.train.length_sampler import LengthWindows
from lorakeet.train.lorafa import LoraFA
from lorakeet.train.loraplus import LoraPlus
from lorakeet.train.microbatch_packing import ForwardGroups, why_model_separates
from lorakeet.train.processes.agreement import check_agreement, check_same_weights
from lorakeet.train.processes.sharding import data_parallel, is_sharded
from lorakeet.train.step_state import Batch, ForwardPass, Reaction


class Trainer(RankTrainer):
    """Trains a model, or the adapter in it.

    Args:
        model, args, and all others: as ``transformers.Trainer``.
        non_finite: Reaction to a loss or gradient that is not finite: ``"stop"`` saves the last good state as a
            checkpoint and raises; ``"skip"`` discards the step with a warning.
        spike: Reaction to a loss or gradient norm far above those before (:mod:`lorakeet.train.guards.spikes`): the
            same, or ``"warn"``, which applies the step.
        any_checkpoint: Resume even from a checkpoint whose settings, data or number of processes differ.
        token_budget: Real tokens of a pass that several micro-batches of a step may share; None or 0: no sharing.
            It needs :func:`lorakeet.patches.padding_free.padding_free` around the training, and for a language model
            :func:`lorakeet.patches.fused_loss.fused_loss` too; a message tells whether they are shared.
        loraplus: B learns faster than A (:mod:`lorakeet.train.loraplus`); a number is the ratio.
        lorafa: A is frozen, and B gets corrected gradients (:mod:`lorakeet.train.lorafa`).
        locations: Where each training sample comes from, as text, for messages; None: its number is shown.

    Attributes:
        step: State of the optimizer step that is computed.
        spikes: Figures of the last steps.

    Raises:
        TrainingError: fp16 on a CPU, trainable parameters in fp16, or LoRA+ or LoRA-FA with ``optimizers``.
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
        spike: Reaction = "stop",
        any_checkpoint: bool = False,
        token_budget: int | None = None,
        loraplus: LoraPlus | float | None = None,
        lorafa: bool = False,
        locations: Sequence[object] | LocatedStream | None = None,
        **settings: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args
        model = preflight.prepare(model, args)
        self.lorafa = LoraFA(model) if lorafa and model is not None else None
        guards: dict[str, Any] = {"non_finite": non_finite, "spike": spike, "locations": locations}
        super().__init__(model, args, *rest, **guards, **settings)
        self.any_checkpoint = any_checkpoint
        self.loraplus = LoraPlus(loraplus) if isinstance(loraplus, (int, float)) else loraplus
        if (name := "loraplus" if self.loraplus else "lorafa" if self.lorafa else "") and self.optimizer is not None:
            raise TrainingError(f"`optimizers=` and `{name}=` both set learning rates", "pass one of them")
        # without it the order of samples follows the last seed given to torch, not the seed of the run
        self.accelerator.dataloader_config.data_seed = args.seed if args.data_seed is None else args.data_seed
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # the parent's loop updates it
        self._shifts_labels = shifts_labels(self.model)
        self._counts_known = False
        self._groups = ForwardGroups(self, token_budget)
        self._collator: SteadyCollator | None = None
        self.add_callback(StepCallback(self))

    # ---- data -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Return the parent's loader with a collator whose random numbers depend on seed, epoch and samples alone.

        Where the data has a column of lengths, the samples of each optimizer step are sorted by length.
        """
        given = self.data_collator
        self.data_collator = self._collator = SteadyCollator(given, self.args.seed)
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
        """Create the parent's optimizer; with LoRA+ its parameter groups are split by learning rate."""
        is_new = self.optimizer is None
        created: Optimizer = super().create_optimizer(*([] if model is None else [model]))
        if is_new and self.loraplus:
            self.loraplus.split_(created, self.model if model is None else model, self.args.learning_rate)
        if is_new and self.lorafa:
            self.lorafa.attach_(created)
        return created

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Wrap the model as the parent does; one with a sharded base in DDP for its adapters alone."""
        if training:
            check_same_weights(self.model)  # DDP would silently take those of the first process
        if training and is_sharded(model) and not isinstance(model, nn.parallel.DistributedDataParallel):
            settings = self.accelerator.ddp_handler.to_kwargs() if self.accelerator.ddp_handler else {}
            return data_parallel(model, self.args.device, **settings)
        wrapped: nn.Module = super()._wrap_model(model, training, dataloader)
        return wrapped

    # ---- loss -------------------------------------------------------------------------------------------------

    @property
    def _models_own_loss(self) -> bool:
        """Whether the loss is the one that the model returns, and not computed here from its outputs."""
        return self.compute_loss_func is None and self.label_smoother is None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Count the targets of the whole optimizer step over all micro-batches and processes, for any model."""
        if not batch_samples or not self._models_own_loss:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(sum(count_targets(batch, self._shifts_labels) for batch in batch_samples), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        return count

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step and its targets, and plan which of them share a pass."""
        batches, self.step.targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._groups.plan_groups(batches)
        return batches, self.step.targets

    @property
    def token_budget(self) -> int:
        """Real tokens of a pass that several micro-batches may share; 0: no sharing."""
        return self._groups.budget

    def why_separate(self) -> str | None:
        """Return why the micro-batches of a step may not share a pass, in half a sentence; None if they may."""
        reasons = {
            "the loss is not the model's own": not self._models_own_loss,
            "the noise of NEFTune depends on the longest sample of a pass": self.args.neftune_noise_alpha is not None,
            "DeepSpeed counts them": self.accelerator.distributed_type == DistributedType.DEEPSPEED,
            "processes share a sample": getattr(self.accelerator, "parallelism_config", None) is not None,
        }
        own = next((reason for reason, holds in reasons.items() if holds), None)
        return own or why_model_separates(self.model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one forward and backward pass, and add it to :attr:`step`.

        A micro-batch that waits for others has the loss 0; the pass that they share has the loss of all.
        """
        if not self._counts_known:
            self._check_loss_counts(inputs)
        batches = self._groups.take(inputs)
        if not batches:
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, self._groups.join(batches), num_items_in_batch)
        self.step.passes.append(ForwardPass(loss, batches))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.step.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.step.grad_norm

    def _check_loss_counts(self, inputs: dict[str, Any]) -> None:
        """Find out whether the model divides by the step's targets, which most forwards accept and some ignore."""
        is_whole_step = self.args.gradient_accumulation_steps == 1 and self.args.world_size == 1
        if self.model_accepts_loss_kwargs and self._models_own_loss and not is_whole_step:
            batch = self._prepare_inputs(inputs)
            with same_random_state(), self.accelerator.autocast():
                self.model_accepts_loss_kwargs = preflight.divides_by_count(self.model, batch)
        self._counts_known = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the model's loss; a mean over a micro-batch is weighted by its share of the step's targets.

        Args:
            model: The model, wrapped for several processes or not.
            inputs: A micro-batch on the model's device.
            return_outputs: Return ``(loss, outputs)``.
            num_items_in_batch: Targets of the whole step.
        """
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
        """Return the weight of a micro-batch's mean that makes the step's loss the mean over all of its targets.

        The parent divides by the micro-batches afterwards, and DDP by the processes.
        """
        processes = self.args.world_size if self.args.average_tokens_across_devices else 1
        return targets / of * self.current_gradient_accumulation_steps * processes

    @property
    def running_model(self) -> nn.Module:
        """The model to call outside the training loop: sharded weights are whole only inside of the wrapper."""
        return self.model_wrapped if self.is_fsdp_enabled else self.model

    # ---- what helpers of a step ask for (lorakeet.train.step_state.StepHost) ------------------------------------

    def micro_batch_loss(self, batch: Batch, targets: Any = None) -> Tensor:
        """Return the loss of one micro-batch on its own, outside the training loop.

        Args:
            batch: A micro-batch as the data loader returns it.
            targets: Targets of the whole step; None: the loss is the mean over this micro-batch.
        """
        with self.accelerator.autocast():
            prepared = self._prepare_inputs(batch)
            loss: Tensor = self.compute_loss(self.running_model, prepared, num_items_in_batch=targets)
        return loss

    def largest_pass(self, batches: Sequence[Batch]) -> Batch:
        """Return the pass with the most tokens of a step of these micro-batches."""
        with silent():  # the first step decides, and says so
            self._groups.plan_groups(batches)
        passes = [self._groups.join(found) for batch in batches if (found := self._groups.take(batch))]
        self._groups.restart()
        return max(passes, key=lambda each: computed_tokens(self.model, each))

    def begin_training(self) -> None:
        """Decide anew whether micro-batches share a pass, then check what the training needs."""
        self._groups.restart()
        if self.args.world_size > 1:
            check_agreement(self.fingerprint())
        super().begin_training()

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch that the collator's random numbers depend on."""
        super().begin_epoch(epoch)
        if self._collator is not None:
            self._collator.epoch = epoch

    # ---- evaluation -------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure the mean loss over all target tokens, and perplexity; other models are evaluated as by the parent.

        This holds for causal language models without ``compute_metrics``.

        Args:
            dataloader: Batches of the held-out rows.
            description, prediction_loss_only, ignore_keys: as the parent's.
            metric_key_prefix: Begins the name of each figure.
        """
        only_loss = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        with same_random_state(), in_fixed_order(self.model):
            if not (only_loss and self._shifts_labels and self._models_own_loss):
                return super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            batches = self._every_batch(dataloader)
            passes = self._groups.of_an_evaluation(batches)
            return self._measure(TokenMeasure(), self.running_model, passes, batches, metric_key_prefix)

    def _every_batch(self, dataloader: Any) -> Any:
        """Return the batches of all processes."""
        return all_batches(dataloader, self.args.eval_batch_size, self.accelerator.num_processes)

    def _measure(
        self, measure: Measure, model: nn.Module, passes: Iterable[list[Batch]], dataloader: Any, prefix: str
    ) -> EvalLoopOutput:
        """Run the held-out loop over ``passes``, the batches of ``dataloader``."""
        self.callback_handler.eval_dataloader = dataloader
        process = (self.accelerator.process_index, self.accelerator.num_processes)

        def score(batches: list[Batch], before: int) -> Sums:
            batch = self._prepare_inputs(self._groups.join(batches))
            with self.accelerator.autocast():
                return measure.score(model, batch, before)

        def after_batch() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        sums = held_out_sums(model, passes, score, after_batch, process)
        figures = {f"{prefix}_{name}": value for name, value in measure.figures(sums).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=figures, num_samples=sums.samples)

    def evaluate_batch(self, batch: dict[str, Tensor]) -> None:
        """Run a batch as an evaluation does, and drop the result."""
        if self.compute_metrics is None and self._shifts_labels and self._models_own_loss:
            fused_sample_losses(self.model, batch)
        else:
            self.prediction_step(self.model, batch, prediction_loss_only=self.compute_metrics is None)

    def _further_fingerprint(self) -> dict[str, str]:
        budget = {"token_budget": str(self.token_budget)} if self.token_budget else {}
        ratios = asdict(self.loraplus) if self.loraplus else {}
        frozen = {"lorafa": "True"} if self.lorafa else {}
        return budget | frozen | {f"loraplus_{name}": str(value) for name, value in ratios.items()}
