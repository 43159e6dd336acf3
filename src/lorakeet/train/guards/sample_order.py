"""Order of the samples of a training, drawn once more: it depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset

from lorakeet.rng import same_random_state


def has_known_order(loader: Any) -> bool:
    """Whether the order of the samples can be drawn again: not that of a stream, nor one without an own seed."""
    batches = getattr(loader, "batch_sampler", None)
    is_map = batches is not None and not isinstance(loader.dataset, IterableDataset)
    return is_map and hasattr([*_samplers(batches)][-1], "set_epoch")


def steps_of_epoch(loader: Any, accumulation: int, epoch: int) -> Iterator[list[list[int]]]:
    """Yield for each step of an epoch the numbers, in the data set, of the samples in each micro-batch of this process.

    Args:
        loader: The prepared loader of the training data; it has numbers.
        accumulation: Micro-batches of a step.
        epoch: Number of the epoch.
    """
    with same_random_state(), _in_epoch(loader.batch_sampler, epoch):
        batches = iter(loader.batch_sampler)
        while step := [list(batch) for batch in islice(batches, accumulation)]:
            yield step


def all_steps(loader: Any, accumulation: int) -> Iterator[list[list[int]]]:
    """Yield the steps of one epoch after the other, without end."""
    for epoch in count():
        yield from steps_of_epoch(loader, accumulation, epoch)


def sample_numbers(loader: Any, steps: int, accumulation: int, micro_batch: int) -> list[int]:
    """Return the numbers, in the data set, of the samples that a micro-batch of this process has.

    Args:
        loader: The prepared loader of the training data.
        steps: Steps before this one.
        accumulation: Micro-batches of a step.
        micro_batch: Number of the micro-batch in the step.

    Returns:
        Numbers of samples; none of a stream, which has no numbers.
    """
    if getattr(loader, "batch_sampler", None) is None or isinstance(loader.dataset, IterableDataset):
        return []
    epoch, step = divmod(steps, -(-len(loader) // accumulation))
    found: list[list[int]] = next(islice(steps_of_epoch(loader, accumulation, epoch), step, None), [])
    return next(iter(found[micro_batch : micro_batch + 1]), [])


@contextmanager
def _in_epoch(batches: Any, epoch: int) -> Iterator[None]:
    """Let the samplers draw the order of an epoch; afterwards they are as before."""
    found = [sampler for sampler in _samplers(batches) if hasattr(sampler, "set_epoch")]
    before = [(sampler, sampler.epoch) for sampler in found if hasattr(sampler, "epoch")]
    for sampler in found:
        sampler.set_epoch(epoch)
    try:
        yield
    finally:
        for sampler, value in before:
            sampler.epoch = value


def _samplers(sampler: Any) -> Iterator[Any]:
    """Yield a sampler and those that it draws from, the innermost last."""
    while sampler is not None:
        yield sampler
        names = ("batch_sampler", "sampler", "inner")
        sampler = next((inner for name in names if (inner := getattr(sampler, name, None)) is not None), None)
