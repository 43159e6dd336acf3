"""A step whose loss or gradient is not finite: seen in every process, its samples named, the last good state kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakeet.rng import same_random_state
from lorakeet.train import preflight
from lorakeet.train.microbatch_packing import Batch

if TYPE_CHECKING:
    from lorakeet.train.trainer import Trainer


def is_finite(trainer: Trainer) -> bool:
    """Whether loss and gradient of this step are finite, in every process (all decide alike)."""
    finite = torch.stack([loss for loss, _ in trainer._losses]).isfinite().all()
    if (
        trainer.accelerator.scaler is None and trainer._grad_norm is not None
    ):  # with loss scaling an overflow is part of the method, and skipped there
        finite = finite & torch.as_tensor(trainer._grad_norm, device=finite.device).isfinite()
    return bool(trainer.accelerator.gather(finite[None]).all())


def complaint(trainer: Trainer) -> str:
    """Which step and which samples were not finite."""
    decode = getattr(trainer.processing_class, "decode", None)
    what = "gradient" if all(loss.isfinite() for loss, _ in trainer._losses) else "loss"
    found = losses_one_by_one(trainer)
    shown = [i for i, (loss, _) in enumerate(found) if not loss.isfinite()] or range(len(found))
    batches = [
        f"micro-batch {i + 1} of {len(found)}, loss {float(found[i][0])}:\n"
        + preflight.describe_batch(found[i][1], decode)
        for i in shown
    ]
    return f"the {what} of step {trainer.state.global_step + 1} is not finite; nothing of it was applied\n" + "\n".join(
        batches
    )


@torch.no_grad()
def losses_one_by_one(trainer: Trainer) -> list[tuple[Tensor, Batch]]:
    """Loss and batch of each micro-batch of the step; where some shared a pass, all run once more, on their own."""
    batches = [batch for _, together in trainer._losses for batch in together]
    if len(batches) == len(trainer._losses):
        return [(loss, batch) for (loss, _), batch in zip(trainer._losses, batches, strict=True)]
    model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model
    with same_random_state(), trainer.accelerator.autocast():
        losses = [
            trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)), num_items_in_batch=trainer._targets)
            for batch in batches
        ]
    return list(zip(losses, batches, strict=True))


def keep_last_good_state(trainer: Trainer) -> str:
    """Save what was there before this step; returns where, as a hint."""
    way_on = "look at these samples, lower the learning rate, or pass over such steps: Trainer(..., non_finite='skip')"
    if not trainer.state.global_step:
        return way_on
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if not folder.exists():
        trainer._save_checkpoint(trainer.model)
    return f"the last good state is in {folder}; {way_on}"
