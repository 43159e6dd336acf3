"""Descriptions of micro-batches for messages: their samples, and where these are in the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from lorakeet.rng import same_random_state

#: Characters of a sample's text that a description shows, and token ids where there is no tokenizer.
TEXT, IDS = 80, 16


def describe_batch(
    inputs: Mapping[str, Any], decode: Callable[[Any], str] | None, places: Sequence[str] | None = None
) -> str:
    """Describe each sample of a micro-batch in a line, so that a person finds it in the data.

    Args:
        inputs: The micro-batch.
        decode: Turns token ids into text; None: ids are shown.
        places: Where each sample is in the data; None: unknown.
    """
    ids = inputs.get("input_ids")
    if not torch.is_tensor(ids) or ids.dim() != 2:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items() if torch.is_tensor(value))
        return "\n".join([*(f"  {place}" for place in places or ()), f"  {shapes}"])
    mask = inputs.get("attention_mask")
    lines = []
    for row, tokens in enumerate(ids):
        real = tokens[mask[row].bool()] if torch.is_tensor(mask) and mask.shape == ids.shape else tokens
        text = repr(decode(real)[:TEXT]) if decode else f"token ids {real[:IDS].tolist()}"
        place = f", {places[row]}" if places and row < len(places) else ""
        lines.append(f"  sample {row}{place}: {len(real)} tokens, {text}")
    return "\n".join(lines)


def sample_numbers(loader: Any, steps: int, accumulation: int, micro_batch: int) -> list[int]:
    """Return the numbers, in the data set, of the samples that a micro-batch of this process has.

    The order of an epoch depends on the seed alone, so it is drawn once more.

    Args:
        loader: The prepared loader of the training data.
        steps: Steps before this one.
        accumulation: Micro-batches of a step.
        micro_batch: Number of the micro-batch in the step.

    Returns:
        Numbers of samples; none of a stream, which has no numbers.
    """
    batches = getattr(loader, "batch_sampler", None)
    if batches is None or isinstance(loader.dataset, IterableDataset):
        return []
    epoch, step = divmod(steps, -(-len(loader) // accumulation))
    for sampler in _samplers(batches):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
    with same_random_state():
        return list(next(islice(iter(batches), step * accumulation + micro_batch, None), []))


def _samplers(sampler: Any) -> Iterator[Any]:
    """Yield a sampler and those that it draws from, the innermost last."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
