"""Passes of a training before it runs: which rows share a forward pass, in the order of the run's own sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from lorakeet.config import TrainSettings

#: Steps whose passes are looked at; longer trainings have more of the same.
MOST_STEPS = 2000
#: Passes differ in size if one has more than this share of tokens more than the other.
_ALIKE = 0.15

#: Real tokens, rows and columns of a micro-batch.
Size = tuple[int, int, int]
#: Function of the sizes of neighboring micro-batches that returns how many of them share each pass.
Joining = Callable[[Sequence[Size]], Sequence[int]]


@dataclass(frozen=True)
class Pass:
    """Rows that share a forward and a backward pass.

    Attributes:
        batches: Numbers of the rows of each micro-batch.
        tokens: Tokens that are computed: real ones, and padding where it is computed.
    """

    batches: tuple[tuple[int, ...], ...]
    tokens: int


def count_steps(rows: int, train: TrainSettings, processes: int = 1) -> int:
    """Return the optimizer steps of a training.

    Args:
        rows: Training samples.
        train: Settings, whose ``steps`` or ``epochs`` are set.
        processes: Processes that share a step.
    """
    of_pass = max(math.ceil(rows / (train.batch_size * train.grad_accum * processes)), 1)
    return train.steps or math.ceil((train.epochs or 1) * of_pass)


def training_passes(
    lengths: Sequence[int], train: TrainSettings, join: Joining, skips_padding: bool, processes: int = 1
) -> list[list[Pass]]:
    """Return the passes of each step of the first process, those of :data:`MOST_STEPS` steps at most.

    Args:
        lengths: Tokens of each row.
        train: Settings of the training loop.
        join: Decides which micro-batches share a pass.
        skips_padding: Whether padding is not computed.
        processes: Processes that share a step.
    """
    size = train.batch_size
    steps = min(count_steps(len(lengths), train, processes), MOST_STEPS)
    windows = _windows(len(lengths), size * train.grad_accum * processes, train.seed)
    found = []
    for window in islice(windows, steps):
        rows = sorted(window, key=lambda row: -lengths[row])
        batches = [tuple(rows[start : start + size]) for start in range(0, len(rows), size)][::processes]
        found.append(_joined(batches, lengths, join, skips_padding))
    return found


def evaluation_passes(lengths: Sequence[int], batch_size: int, join: Joining, skips_padding: bool) -> list[Pass]:
    """Return the passes of an evaluation, the longest rows first.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        join: Decides which micro-batches share a pass.
        skips_padding: Whether padding is not computed.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = [tuple(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return _joined(batches, lengths, join, skips_padding)


def largest_pass(lengths: Sequence[int], train: TrainSettings, join: Joining, skips_padding: bool) -> Pass:
    """Return the pass of the longest rows of all, which a training rehearses before its first step.

    Args:
        lengths: Tokens of each row.
        train: Settings of the training loop.
        join: Decides which micro-batches share a pass.
        skips_padding: Whether padding is not computed.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])[: train.batch_size * train.grad_accum]
    batches = [tuple(rows[start : start + train.batch_size]) for start in range(0, len(rows), train.batch_size)]
    return max(_joined(batches, lengths, join, skips_padding), key=lambda each: each.tokens)


def typical_passes(steps: Sequence[Sequence[Pass]], largest: Pass) -> list[Pass]:
    """Return the largest pass, the median and a small one, without those that are about as large as another."""
    ordered = sorted((each for step in steps for each in step), key=lambda each: each.tokens)
    chosen = [largest]
    for each in (ordered[len(ordered) // 2], ordered[len(ordered) // 20]):
        if all(abs(each.tokens - other.tokens) > _ALIKE * other.tokens for other in chosen):
            chosen.append(each)
    return chosen


def _windows(rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield the rows of each step, epoch after epoch, as accelerate's seeded sampler draws them."""
    epoch = 0
    while True:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        yield from (order[start : start + size] for start in range(0, rows, size))
        epoch += 1


def _joined(
    batches: Sequence[tuple[int, ...]], lengths: Sequence[int], join: Joining, skips_padding: bool
) -> list[Pass]:
    sizes = [(sum(lengths[r] for r in rows), len(rows), max(lengths[r] for r in rows)) for rows in batches]
    found, start = [], 0
    for count in join(sizes):
        tokens = sum(real if skips_padding else rows * columns for real, rows, columns in sizes[start : start + count])
        found.append(Pass(tuple(batches[start : start + count]), tokens))
        start += count
    return found
