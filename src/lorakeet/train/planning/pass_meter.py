"""Meter of the passes of a run: what they cost, measured on a model cut to a few layers, or read from the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.device_dtype import choose_device
from lorakeet.base.load import ModelInfo
from lorakeet.config import RunConfig, TaskSettings
from lorakeet.data.collate import PaddingCollator, make_collator
from lorakeet.patches.gradient_checkpointing import can_checkpoint
from lorakeet.patches.of_training import training_patches
from lorakeet.patches.padding_free import is_padding_free
from lorakeet.patches.thread_order import in_fixed_order
from lorakeet.plan.cut_model import CutModel, cut
from lorakeet.plan.measure_pass import measure_pass
from lorakeet.plan.pass_cost import PassCost
from lorakeet.plan.passes import Pass
from lorakeet.plan.saved_costs import saved_parts
from lorakeet.quant.protocol import computing_dtypes, value_count
from lorakeet.rng import same_random_state
from lorakeet.runs.process_memory import map_large_blocks
from lorakeet.tasks.measure import OWN_LOSS, TaskMeasure, TokenMeasure, own_loss
from lorakeet.tasks.task import Task
from lorakeet.train.microbatch_packing import (
    batches_per_pass,
    default_token_budget,
    join_batches,
    padding_token,
    why_model_separates,
)
from lorakeet.train.planning.rows import Rows

#: Floating-point operations of a pass that is measured at most; a larger one is measured with fewer tokens.
MOST_WORK = 4e11
#: Tokens that a pass is measured with at least.
LEAST_TOKENS = 128


class PassMeter:
    """Costs of passes of a run's model, measured on a few of its layers, or read from the cache.

    Args:
        config: Settings of the run.
        model: The whole model, on the meta device.
        found: Configuration and tokenizer of the base.
        chosen: Settings of the task, whose type is concrete.
        task: The task.
        rows: The samples.
    """

    def __init__(
        self, config: RunConfig, model: PeftModel, found: ModelInfo, chosen: TaskSettings, task: Task, rows: Rows
    ) -> None:
        self.config, self.model, self.task, self.rows, self.found = config, model, task, rows, found
        self.device = choose_device(config.base.device)
        self.collator: Any = make_collator(chosen, found.tokenizer, model) if found.tokenizer else PaddingCollator(0)
        self.undo = ExitStack()
        self.per_token = 6 * value_count(model)
        self.settings = self._key()
        # fused layers need weights; whether padding and logits are computed is known without
        bare = config.train.model_copy(update={"fused_layers": False})
        with training_patches(model, bare):
            self.skips_padding = is_padding_free(model)
            self.joins = why_model_separates(model) is None and task.name != "FEATURE_EXTRACTION"
        self.can_checkpoint = can_checkpoint(model)
        self.budget = self._budget()

    def _budget(self) -> int:
        train = self.config.train
        micro_batch = train.batch_size * self.config.data.max_length
        budget = default_token_budget(self.model, self.device, micro_batch)
        return budget if train.token_budget is None else train.token_budget

    def _key(self) -> dict[str, Any]:
        """Return what decides the costs, apart from the batch and the machine."""
        train, config = self.config.train, cast(Any, self.model.config)
        return {
            "model": config.to_dict(),
            "class": type(self.model).__mro__[1].__name__,
            "base": [str(self.device), self.config.base.bits, self.config.base.dtype],
            "lora": self.config.lora.model_dump(),
            "shapes": [
                [name, list(p.shape), str(p.dtype), p.requires_grad] for name, p in self.model.named_parameters()
            ],
            "train": [train.padding_free, train.fused_loss, train.fused_layers, self.maps_large_blocks],
        }

    @cached_property
    def cut(self) -> CutModel:
        """The model cut to a few layers, with the patches of a training."""
        made = cut(self.model, self.device)
        self.undo.enter_context(training_patches(made.model, self.config.train))
        return made

    def join(self, sizes: Sequence[Any]) -> Sequence[int]:
        """Return how many neighboring micro-batches share each pass."""
        if not (self.joins and self.budget and len(sizes) > 1):
            return [1] * len(sizes)
        return batches_per_pass(sizes, self.budget)

    def cost(self, one: Pass) -> PassCost:
        """Return the cost of a pass of the training."""
        return self._cost(one, self.rows.train, training=True)

    def evaluation_cost(self, one: Pass) -> PassCost:
        """Return the cost of a pass of an evaluation."""
        return self._cost(one, self.rows.held_out, training=False)

    def _cost(self, one: Pass, rows: Any, training: bool) -> PassCost:
        with same_random_state():
            batches = [self.collator([rows[row] for row in batch]) for batch in one.batches]
            batch = (
                batches[0]
                if len(batches) == 1
                else join_batches(batches, padding_token(self.model, self.found.tokenizer)[0])
            )
        batch, share = _shortened(batch, one.tokens, max(int(MOST_WORK / self.per_token), LEAST_TOKENS))
        shapes = {name: [list(v.shape), int(v.ne(-100).sum())] for name, v in batch.items() if torch.is_tensor(v)}
        mask = batch.get("attention_mask")
        shapes["lengths"] = sorted(mask.sum(1).tolist()) if torch.is_tensor(mask) else []
        parts = saved_parts(
            {**self.settings, "batch": shapes, "training": training}, lambda: self._measure(batch, training)
        )
        cost = PassCost(int(one.tokens * share), tuple(parts)).grown(1 / share, self.config.train.fused_loss)
        return PassCost(one.tokens, cost.parts)

    @property
    def maps_large_blocks(self) -> bool:
        """Whether the run is sure to map large blocks on their own, as it does where layers are checkpointed."""
        return self.config.train.gradient_checkpointing not in (False, "auto")

    def _measure(self, batch: Mapping[str, Any], training: bool) -> Any:
        if self.maps_large_blocks:
            map_large_blocks()  # their fresh pages take time
        model = self.cut.model
        batch = {name: v.to(self.device) if torch.is_tensor(v) else v for name, v in batch.items()}
        model.train(training)
        with torch.set_grad_enabled(training), same_random_state(), in_fixed_order(model):
            run = (lambda: self._loss(model, batch)) if training else (lambda: self._score(model, batch))
            parts = measure_pass(model, self.cut.layers, run, batch)
        return list(self.cut.whole(parts))

    def _loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        with self._autocast():
            return own_loss(self.task, model, batch)[0] if self.task.name in OWN_LOSS else model(**batch).loss

    def _score(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        tokenizer = self.found.tokenizer
        is_causal = self.task.name == "CAUSAL_LM"
        measure: Any = TokenMeasure() if is_causal else TaskMeasure(self.task, tokenizer, generated=0)
        with self._autocast():
            measure.score(model, batch)

    def _autocast(self) -> Any:
        half = computing_dtypes(self.model) & {torch.bfloat16, torch.float16}
        dtype = half.pop() if len(half) == 1 else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=len(half) == 1)


def _shortened(batch: Mapping[str, Any], tokens: int, most: int) -> tuple[dict[str, Any], float]:
    """Return a batch of at most ``most`` of its ``tokens`` tokens: fewer rows, then fewer columns; and their share."""
    ids = batch.get("input_ids")
    if tokens <= most or not torch.is_tensor(ids) or ids.ndim != 2:
        return dict(batch), 1.0
    rows = max(int(len(ids) * most / tokens), 1)
    columns = max(min(ids.shape[1], int(ids.shape[1] * len(ids) * most / tokens / rows)), 2)
    short = {
        name: v[:rows, :columns]
        if torch.is_tensor(v) and v.shape == ids.shape
        else v[:rows]
        if torch.is_tensor(v)
        else v
        for name, v in batch.items()
    }
    mask, was = short.get("attention_mask"), batch.get("attention_mask")
    left = int(mask.sum()) / max(int(was.sum()), 1) if torch.is_tensor(mask) and torch.is_tensor(was) else most / tokens
    return short, left
