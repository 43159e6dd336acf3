"""Memory plan of a training: free memory, the largest forward pass, and the layers to checkpoint so that it fits."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch

from lorakeet.log import info, warn
from lorakeet.patches.gradient_checkpointing import KeptBytes, can_checkpoint, choose_every, kept_by
from lorakeet.patches.padding_free import is_padding_free
from lorakeet.rng import same_random_state
from lorakeet.train.guards import preflight

if TYPE_CHECKING:
    from lorakeet.train.trainer import Trainer

#: Share of the free memory that a step may take; kernels need workspace, and other processes run too.
SHARE = 0.85
#: Samples of a stream that are inspected.
INSPECTED = 64
#: Files in which Linux reports memory: of the machine, the control groups of this process, and their limits.
_MACHINE, _MEMBER, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: Files of a control group, version 2: limit, use; and the line of memory.stat with the part that could be dropped.
_V2 = ("memory.max", "memory.current", "inactive_file")
#: The same, version 1.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def every_that_fits(trainer: Trainer, free: int | None, max_length: int) -> int | None:
    """Choose n so that a step fits into memory if every n-th layer is checkpointed, with as few as possible.

    The bytes that a pass keeps are measured on the longest sample together with the shortest, and grow with the tokens
    of a pass. All processes get the same answer, and a message reports it.

    Args:
        trainer: Its data has a column ``length``.
        free: Free bytes on the device; None if unknown.
        max_length: Tokens that a sample of a stream may have.

    Returns:
        n; None where no layer has to be checkpointed, or the free memory is unknown.
    """
    if free is None or not can_checkpoint(trainer.model):
        return None
    samples, longest = _two_samples(trainer.train_dataset, max_length)
    kept = _kept(trainer, samples)
    lengths = [sample["length"] for sample in samples]
    without_padding = is_padding_free(trainer.model)
    tokens = largest_pass(trainer, longest, without_padding)
    passes = tokens / (sum(lengths) if without_padding else len(lengths) * max(lengths))
    available = SHARE * free - preflight.checkpoint_bytes(trainer.model)  # gradients and moments come later
    wanted = choose_every(kept, passes, available)
    choices = trainer.accelerator.gather(torch.tensor([wanted or len(kept.layers) + 1], device=trainer.args.device))
    every = int(choices.min())
    if every > len(kept.layers):
        return None
    if trainer.is_world_process_zero():
        _log_plan(every, kept, passes, f"a pass of {tokens:,} tokens", free, available)
    return every


def largest_pass(trainer: Trainer, longest: int, without_padding: bool) -> int:
    """Return the tokens of the largest pass of a training, with padding where it is computed."""
    args = trainer.args
    one = args.per_device_train_batch_size * longest
    joined = min(trainer.token_budget, args.gradient_accumulation_steps * one) if without_padding else 0
    return max(one, joined)


def _two_samples(dataset: Any, max_length: int) -> tuple[list[Any], int]:
    """Return the longest sample and the shortest, and the largest length that a sample may have."""
    if isinstance(dataset, datasets.Dataset):
        lengths = dataset["length"][:]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return [dataset[order[-1]], dataset[order[0]]], max(lengths)
    first = sorted(islice(dataset, INSPECTED), key=lambda sample: int(sample["length"]))
    return [first[-1], first[0]], max_length


def _kept(trainer: Trainer, samples: list[Any]) -> KeptBytes:
    """Measure what a pass of these samples keeps; draws no random number from the training."""
    model = trainer.model
    was_training = model.training
    model.train()
    try:
        with same_random_state(), torch.enable_grad():
            batch = trainer.data_collator(samples)
            return kept_by(model, lambda: trainer.micro_batch_loss(batch, torch.tensor(1)))
    finally:
        model.train(was_training)


def _log_plan(every: int, kept: KeptBytes, passes: float, largest: str, free: int, available: float) -> None:
    numbers = [str(number) for number in range(0, len(kept.layers), every)]
    some = ", ".join([*numbers[:3], *["…"] * (len(numbers) > 3)])
    which = "all layers are" if every == 1 else f"layers {some} are" if len(numbers) > 1 else "layer 0 is"
    need = kept.peak(None) * passes
    info(
        f"memory     {which} checkpointed: {largest} would need {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
    )
    if (least := kept.peak(every) * passes) > available:
        warn(
            f"a step still needs {least / 1e9:.2f} GB and may not fit: lower train.token_budget, train.batch_size or "
            "data.max_length"
        )


# ---- free memory ------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes on ``device`` for this process, one of several alike on this machine; None if unknown.

    On a GPU this is what is free, and what torch holds without using it. On a CPU it is what Linux calls available.
    The limit of a control group (a container) bounds it, and the processes share it evenly.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not _MACHINE.exists():
        return None
    line = next(line for line in _MACHINE.read_text().splitlines() if line.startswith("MemAvailable:"))
    available = min([int(line.split()[1]) * 1024, *_left_of_limits(_MEMBER, _GROUPS)])
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_of_limits(member: Path, root: Path) -> list[int]:
    """Return the bytes that the limit of each control group of this process leaves; empty without control groups."""
    if not member.exists():
        return []
    found = []
    for line in member.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top, names = (root / "memory", _V1) if controllers else (root, _V2)
            folder = top / path.lstrip("/")
            depth = len(folder.relative_to(top).parts)
            groups = [folder, *folder.parents][: depth + 1]  # each group bounds those in it
            found += [left for group in groups if (left := _left_of_limit(group, *names)) is not None]
    return found


def _left_of_limit(folder: Path, limit: str, use: str, droppable: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / use).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # this container does not see the group
        return None
    return None if most == "max" else max(int(most) - used + int(stat.get(droppable, 0)), 0)
