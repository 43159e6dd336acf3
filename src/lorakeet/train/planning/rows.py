"""Samples of a run that is planned: those of its data, or made up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets

from lorakeet.config import RunConfig
from lorakeet.data.prepared import Prepared
from lorakeet.errors import ConfigError

#: Samples of a stream that are looked at.
INSPECTED = 64


@dataclass(frozen=True)
class Rows:
    """Samples of a run: those of training and those held out.

    Attributes:
        train, held_out: Samples that can be indexed by number.
        lengths, held_out_lengths: Their tokens.
        is_stream: Whether the training samples are the first ones of a stream.
        growth: Size of the longest sample that may come, relative to the longest one here: 1, but for a stream.
    """

    train: Any
    held_out: Any
    lengths: list[int]
    held_out_lengths: list[int]
    is_stream: bool = False
    growth: float = 1.0


def rows_of(data: Prepared | None, config: RunConfig, task: str) -> Rows:
    """Return the samples of prepared data; without data, samples of the greatest length.

    Raises:
        ConfigError: There is no data, and samples of the task cannot be made up.
    """
    if data is None:
        if task != "CAUSAL_LM":
            raise ConfigError(f"memory and time of {task} depend on its data, and there is none", "give --data")
        length = config.data.max_length
        count = config.train.batch_size * config.train.grad_accum
        made = [{"input_ids": [1] * length, "length": length}] * count
        return Rows(made, made[:1] if config.data.eval_fraction else [], [length] * count, [length] * bool(made))
    held_out: Any = data.held_out if data.held_out is not None else []
    held_out_lengths = held_out["length"][:] if len(held_out) else []
    if isinstance(data.train, datasets.Dataset):
        return Rows(data.train, held_out, data.train["length"][:], held_out_lengths)
    first = list(islice(data.train, INSPECTED))
    lengths = [int(sample["length"]) for sample in first]
    return Rows(first, held_out, lengths, held_out_lengths, True, max(config.data.max_length / max(lengths), 1.0))
