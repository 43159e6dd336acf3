"""Does the largest pass of a training fit into memory, and if not, which layers have to be run again in its backward pass?"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import torch

from lorakeet.log import info, warn
from lorakeet.patches.gradient_checkpointing import Kept, can_recompute, choose_every, kept_by
from lorakeet.patches.padding_free import is_padding_free
from lorakeet.rng import same_random_state
from lorakeet.train import preflight

if TYPE_CHECKING:
    from lorakeet.train.trainer import Trainer

#: Of the free memory, what a step may take: kernels need room to work, and others live on the machine too.
SHARE = 0.85
#: Samples of a stream that are looked at.
LOOKED_AT = 64


def every_that_fits(trainer: Trainer, free: int | None, max_length: int) -> int | None:
    """n, if every n-th layer has to be run again for a step to fit into memory (as few as possible), which is then said;
    None where none has to, or nobody can tell.

    What a pass keeps is measured on the longest sample beside the shortest, and grows with the tokens of a pass. All
    processes get the same answer.

    Args:
        trainer: Its data has a column ``length``.
        free: Bytes that are free on the device; None if nobody can tell.
        max_length: Tokens that a sample of a stream may have.
    """
    if free is None or not can_recompute(trainer.model):
        return None
    samples, longest = _two_samples(trainer.train_dataset, max_length)
    kept = _kept(trainer, samples)
    lengths = [sample["length"] for sample in samples]
    without_padding = is_padding_free(trainer.model)
    tokens = largest_pass(trainer, longest, without_padding)
    passes = tokens / (sum(lengths) if without_padding else len(lengths) * max(lengths))
    room = SHARE * free - preflight.checkpoint_bytes(trainer.model)  # gradients and moments are still to come
    wanted = choose_every(kept, passes, room)
    choices = trainer.accelerator.gather(torch.tensor([wanted or len(kept.layers) + 1], device=trainer.args.device))
    every = int(choices.min())
    if every > len(kept.layers):
        return None
    if trainer.is_world_process_zero():
        _say(every, kept, passes, tokens, free, room)
    return every


def largest_pass(trainer: Trainer, longest: int, without_padding: bool) -> int:
    """Tokens of the largest pass that a training may have, padding among them where it is computed."""
    args = trainer.args
    one = args.per_device_train_batch_size * longest
    joined = min(trainer.token_budget, args.gradient_accumulation_steps * one) if without_padding else 0
    return max(one, joined)


def _two_samples(dataset: Any, max_length: int) -> tuple[list[Any], int]:
    """The longest sample and the shortest, and how long a sample may be."""
    if isinstance(dataset, datasets.Dataset):
        lengths = dataset["length"][:]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return [dataset[order[-1]], dataset[order[0]]], max(lengths)
    first = sorted(islice(dataset, LOOKED_AT), key=lambda sample: int(sample["length"]))
    return [first[-1], first[0]], max_length


def _kept(trainer: Trainer, samples: list[Any]) -> Kept:
    """What a pass of these samples keeps; draws no random number from the training."""
    model = trainer.model
    was_training = model.training
    model.train()
    try:
        with same_random_state(), torch.enable_grad(), trainer.accelerator.autocast():
            batch = trainer._prepare_inputs(trainer.data_collator(samples))
            return kept_by(model, lambda: trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(1)))
    finally:
        model.train(was_training)


def _say(every: int, kept: Kept, passes: float, tokens: int, free: int, room: float) -> None:
    numbers = [str(number) for number in range(0, len(kept.layers), every)]
    some = ", ".join([*numbers[:3], *["…"] * (len(numbers) > 3)])
    which = "all layers are" if every == 1 else f"layers {some} are" if len(numbers) > 1 else "layer 0 is"
    need = kept.peak(None) * passes
    info(
        f"memory     {which} run again in the backward pass: a pass of {tokens:,} tokens would need {need / 1e9:.2f} GB, "
        f"{free / 1e9:.2f} GB are free"
    )
    if (least := kept.peak(every) * passes) > room:
        warn(
            f"it still needs {least / 1e9:.2f} GB and may not fit: lower train.token_budget, train.batch_size or "
            "data.max_length"
        )
