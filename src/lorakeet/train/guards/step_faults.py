"""Faults of a step, found before it is applied: a loss or gradient that is not finite, or a spike; and their report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor

from lorakeet.rng import same_random_state
from lorakeet.train.guards.batch_text import describe_batch
from lorakeet.train.guards.spikes import SpikeDetector
from lorakeet.train.step_state import Batch, StepHost, StepState

#: Micro-batches that a report shows; further ones are counted.
SHOWN = 4


@dataclass(frozen=True)
class StepFault:
    """A fault of a step.

    Attributes:
        kind: Setting that decides the reaction.
        figure: The figure at fault, ``loss`` or ``gradient norm``.
        sentence: The fault in a clause, with the number of the step.
    """

    kind: Literal["non_finite", "spike"]
    figure: str
    sentence: str


def step_figures(step: StepState, accelerator: Any) -> dict[str, float]:
    """Return loss and gradient norm of the step, the same in all processes; one of them not finite makes all so."""
    loss = torch.stack([each.loss for each in step.passes]).float().sum()
    norm = loss * 0 if step.grad_norm is None else torch.as_tensor(step.grad_norm, device=loss.device).float()
    every = accelerator.gather(torch.stack([loss, norm])[None])  # [processes, 2]
    mean, largest = torch.stack([every[:, 0].mean(), every[:, 1].max()]).tolist()
    figures = {"loss": mean, "gradient norm": largest}
    # with loss scaling an overflow is part of the method, and the scaler skips the step
    if step.grad_norm is None or (accelerator.scaler is not None and not math.isfinite(figures["gradient norm"])):
        del figures["gradient norm"]
    return figures


def find_fault(figures: Mapping[str, float], number: int, detector: SpikeDetector) -> StepFault | None:
    """Return the fault of a step with these figures; None if there is none.

    Args:
        figures: Of :func:`step_figures`.
        number: Number of the step, from 1.
        detector: Knows the steps before.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            return StepFault("non_finite", name, f"the {name.removesuffix(' norm')} of step {number} is not finite")
    if spike := detector.find(figures):
        return StepFault("spike", spike.name, f"the {spike.name} of step {number} is a spike: {spike.comparison}")
    return None


def describe_fault(fault: StepFault, host: StepHost) -> str:
    """Describe the fault and the samples of the micro-batches that caused it, of all processes.

    These are the ones whose loss is not finite, or for a spike the one with the largest loss. Where the gradient is at
    fault, they are all.
    """
    losses = micro_batch_losses(host)
    decode = getattr(host.processing_class, "decode", None)
    process = f"process {host.args.process_index}, " if host.args.world_size > 1 else ""
    mine = []
    for i, (loss, batch) in enumerate(losses):
        text = f"{process}micro-batch {i + 1} of {len(losses)}, loss {float(loss):.4g}:\n"
        mine.append((float(loss), text + describe_batch(batch, decode, host.sample_places(i))))
    every = gather_object(mine)
    shown = _at_fault(fault, every)
    more = f" and {len(shown) - SHOWN} more micro-batches" if len(shown) > SHOWN else ""
    return "\n".join([f"{fault.sentence}; the step was not applied", *shown[:SHOWN]]) + more


def _at_fault(fault: StepFault, batches: Sequence[tuple[float, str]]) -> list[str]:
    """Return the texts of the micro-batches, given with their losses, that caused the fault."""
    if fault.figure != "loss":
        return [text for _, text in batches]
    if fault.kind == "spike":
        return [max(batches, key=lambda batch: batch[0])[1]]
    return [text for loss, text in batches if not math.isfinite(loss)] or [text for _, text in batches]


@torch.no_grad()
def micro_batch_losses(host: StepHost) -> Sequence[tuple[Tensor, Batch]]:
    """Return loss and batch of each micro-batch of the step; batches that shared a pass run once more on their own."""
    step = host.step
    batches = step.batches
    if len(batches) == len(step.passes):
        return [(each.loss, batch) for each, batch in zip(step.passes, batches, strict=True)]
    with same_random_state():
        losses = [host.micro_batch_loss(dict(batch), step.targets) for batch in batches]
    return list(zip(losses, batches, strict=True))
