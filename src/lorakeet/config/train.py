"""Settings of the training loop."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from lorakeet.setting_types import LARGEST, Count, Float, Index, NonNegative, Rate, Section, Seed, Text

#: Peak learning rate of a run; and of one whose small data takes several passes.
DEFAULT_RATE, SMALL_DATA_RATE = 2e-4, 1e-3
#: Steps below which one pass over the data teaches little: then there are more passes, up to a number at which texts are
#: learned by heart.
ENOUGH_STEPS, MOST_PASSES = 100, 10


class TrainSettings(Section):
    """The training loop: length, batches, optimizer, reports and memory."""

    steps: Count | None = Field(None, description="optimizer steps; default: as many as train.epochs takes")
    init_adapter: Text | None = Field(
        None,
        description="folder or hub id of an adapter to continue from, with its settings of LoRA; default: a new one",
    )
    epochs: Annotated[Float, Field(gt=0, le=10**6)] | None = Field(
        None,
        description="passes over the data, if train.steps is not set; default: 1; of small data as many as 100 steps take, "
        "at most 10",
    )
    batch_size: Count = Field(4, description="samples per micro-batch and process")
    grad_accum: Count = Field(4, description="micro-batches per optimizer step")
    lr: Rate | None = Field(
        None, description="peak learning rate; default: 2e-4; 1e-3 where the number of passes is chosen for small data"
    )
    loraplus_ratio: Annotated[Float, Field(ge=1, le=LARGEST)] | None = Field(
        None, description="learning rate of B, as a multiple of that of A (LoRA+, arXiv:2402.12354); default: 1"
    )
    loraplus_lr_embedding: Rate = Field(
        1e-6, description="peak learning rate of adapted embeddings, with loraplus_ratio"
    )
    lorafa: bool = Field(
        False,
        description="freeze A, and train B with the gradient nearest to the whole weight's (LoRA-FA, arXiv:2308.03303)",
    )
    warmup: Index = Field(0, description="steps of linear warm-up to the peak learning rate")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="learning rate schedule after the warm-up"
    )
    weight_decay: NonNegative = Field(0.0, description="AdamW's weight decay")
    max_grad_norm: NonNegative = Field(1.0, description="norm to which gradients are clipped; 0: no clipping")
    seed: Seed = Field(42, description="seed of initialization, order and dropout")
    log_every: Count = Field(1, description="steps between lines of metrics.jsonl")
    eval_every: Count | None = Field(
        None, description="steps between evaluations; default: only before and after training"
    )
    save_every: Count | None = Field(
        None, description="steps between checkpoints; default: by time, see train.save_minutes"
    )
    save_minutes: NonNegative = Field(
        5.0,
        description="minutes between checkpoints, where train.save_every is not set; longer if saving would take over 1 % "
        "of the time; 0: a checkpoint only on Ctrl-C",
    )
    keep_checkpoints: Count = Field(
        2, description="newest checkpoints to keep; of two, one is left if the other is damaged"
    )
    keep_best: bool = Field(
        False, description="save and keep the checkpoint of the lowest held-out loss too; needs train.eval_every"
    )
    load_best: bool = Field(
        False,
        description="end with the adapter of the lowest held-out loss, not of the last step; needs train.eval_every",
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="on a loss or gradient that is not finite: stop, with the last good state saved, or skip the step",
    )
    spike: Literal["stop", "skip", "warn"] = Field(
        "stop",
        description="on a loss or gradient norm far above those of the last 128 steps: as non_finite, or warn and apply the "
        "step",
    )
    spectrum: bool = Field(
        True, description="log at each evaluation how many directions of the rank the update uses, and draw ranks.png"
    )
    gradient_checkpointing: bool | Count | Literal["auto"] = Field(
        "auto",
        description="recompute layers in the backward pass: less memory, more time; true: all; n: layer 0 and every n-th "
        "after it; auto: as few as a step needs to fit into memory (reported)",
    )
    fsdp: bool = Field(
        False,
        description="shard the frozen base over the processes (FSDP2), for one that does not fit one device; adapters stay "
        "whole in each",
    )
    fsdp_size: Count | None = Field(
        None,
        description="processes that share one copy of the base, with fsdp; default: all; the number of GPUs of a node keeps "
        "the traffic inside the nodes",
    )
    padding_free: bool = Field(True, description="skip the computation of padding, where the architecture allows it")
    fused_loss: bool = Field(
        True, description="compute a language model's loss in chunks, without the full logits in memory"
    )
    fused_layers: bool = Field(
        True,
        description="use fused norms, gated activations and rotary embeddings, for known architectures: less memory and less "
        "memory traffic",
    )
    token_budget: Index | None = Field(
        None,
        description="tokens, without padding, up to which micro-batches of a step run as one forward pass (with "
        "padding_free); "
        "default: batch_size x data.max_length, on a CPU at most 768, or 1024 in 8 bits; 0: one pass per micro-batch",
    )

    def for_rows(self, rows: int, processes: int = 1) -> TrainSettings:
        """Return these settings with the passes and the learning rate that they leave out, for this much data.

        Args:
            rows: Samples to train on; 0 of a stream.
            processes: Processes that share a step.
        """
        steps = math.ceil(rows / (self.batch_size * self.grad_accum * processes))  # of one pass
        small = self.steps is None and self.epochs is None and 0 < steps < ENOUGH_STEPS
        passes = float(min(MOST_PASSES, math.ceil(ENOUGH_STEPS / steps))) if small else 1.0
        rate = self.lr or (SMALL_DATA_RATE if small else DEFAULT_RATE)
        return self.model_copy(update={"epochs": self.epochs or (None if self.steps else passes), "lr": rate})
