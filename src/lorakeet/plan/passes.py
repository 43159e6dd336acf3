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
    steps = _batches_of_steps(lengths, train, processes)
    return [passes_of(batches[::processes], lengths, join, skips_padding) for batches in steps]


def evaluation_passes(lengths: Sequence[int], batch_size: int, join: Joining, skips_padding: bool) -> list[Pass]:
    """Return the passes of an evaluation, the longest rows first.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        join: Decides which micro-batches share a pass.
        skips_padding: Whether padding is not computed.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return passes_of(_in_batches(rows, batch_size), lengths, join, skips_padding)


def largest_pass(
    lengths: Sequence[int],
    train: TrainSettings,
    join: Joining,
    skips_padding: bool,
    processes: int = 1,
    order_known: bool = True,
) -> Pass:
    """Return the largest pass of all steps and processes, which a training rehearses before its first step.

    Of a stream, or of more than :data:`MOST_STEPS` steps, it is the pass of the longest rows, which may meet in a step.

    Args:
        lengths: Tokens of each row.
        train: Settings of the training loop.
        join: Decides which micro-batches share a pass.
        skips_padding: Whether padding is not computed.
        processes: Processes that share a step.
        order_known: Whether these are all rows, so that the rows of each step are known.
    """
    if not order_known or count_steps(len(lengths), train, processes) > MOST_STEPS:
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[: train.batch_size * train.grad_accum]
        steps, processes = [_in_batches(longest, train.batch_size)], 1
    else:
        steps = _batches_of_steps(lengths, train, processes)
    shares = (batches[process::processes] for batches in steps for process in range(processes))
    passes = (each for share in shares for each in passes_of(share, lengths, join, skips_padding))
    return max(passes, key=lambda each: each.tokens)


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


def _batches_of_steps(lengths: Sequence[int], train: TrainSettings, processes: int) -> list[list[tuple[int, ...]]]:
    """Return the micro-batches of each step, of all processes, the longest rows of the step first."""
    steps = min(count_steps(len(lengths), train, processes), MOST_STEPS)
    windows = _windows(len(lengths), train.batch_size * train.grad_accum * processes, train.seed)
    return [
        _in_batches(sorted(window, key=lambda row: -lengths[row]), train.batch_size)
        for window in islice(windows, steps)
    ]


def _in_batches(rows: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]


def passes_of(
    batches: Sequence[Sequence[int]], lengths: Sequence[int], join: Joining, skips_padding: bool
) -> list[Pass]:
    """Return the passes of micro-batches.

    Args:
        batches: Numbers of the rows of each.
        lengths: Tokens of each row.
        join: Decides which of them share a pass.
        skips_padding: Whether padding is not computed.
    """
    sizes = [(sum(lengths[r] for r in rows), len(rows), max(lengths[r] for r in rows)) for rows in batches]
    found, start = [], 0
    for count in join(sizes):
        tokens = sum(real if skips_padding else rows * columns for real, rows, columns in sizes[start : start + count])
        found.append(Pass(tuple(tuple(rows) for rows in batches[start : start + count]), tokens))
        start += count
    return found
