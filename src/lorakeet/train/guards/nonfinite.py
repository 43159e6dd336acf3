"""Detection and report of a step whose loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakeet.rng import same_random_state
from lorakeet.train.guards import preflight
from lorakeet.train.step_state import Batch, StepState


def is_finite(step: StepState, accelerator: Any) -> bool:
    """Whether loss and gradient of the step are finite in every process; all processes get the same answer."""
    finite = torch.stack([each.loss for each in step.passes]).isfinite().all()
    # with loss scaling an overflow is part of the method, and the scaler skips the step
    if accelerator.scaler is None and step.grad_norm is not None:
        finite = finite & torch.as_tensor(step.grad_norm, device=finite.device).isfinite()
    return bool(accelerator.gather(finite[None]).all())


def nonfinite_error(
    step: StepState,
    number: int,
    loss_of: Callable[[Batch, Any], Tensor],
    decode: Callable[[Any], str] | None,
) -> str:
    """Describe the step and those of its samples whose loss is not finite.

    Args:
        step: The step, with all its passes.
        number: Number of the step, from 1.
        loss_of: Computes the loss of a micro-batch on its own, given the targets of the step.
        decode: Turns token ids into text; None: ids are shown.
    """
    name = "gradient" if all(each.loss.isfinite() for each in step.passes) else "loss"
    losses = micro_batch_losses(step, loss_of)
    shown = [i for i, (loss, _) in enumerate(losses) if not loss.isfinite()] or range(len(losses))
    batches = [
        f"micro-batch {i + 1} of {len(losses)}, loss {float(losses[i][0])}:\n"
        + preflight.describe_batch(losses[i][1], decode)
        for i in shown
    ]
    return "\n".join([f"the {name} of step {number} is not finite; the step was not applied", *batches])


@torch.no_grad()
def micro_batch_losses(step: StepState, loss_of: Callable[[Batch, Any], Tensor]) -> Sequence[tuple[Tensor, Batch]]:
    """Return loss and batch of each micro-batch of the step; batches that shared a pass run once more on their own."""
    batches = step.batches
    if len(batches) == len(step.passes):
        return [(each.loss, batch) for each, batch in zip(step.passes, batches, strict=True)]
    with same_random_state():
        losses = [loss_of(dict(batch), step.targets) for batch in batches]
    return list(zip(losses, batches, strict=True))
