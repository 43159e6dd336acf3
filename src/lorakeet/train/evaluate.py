"""Held-out loss: the mean over every target token, however the samples fall into batches.

A mean of batch means, as it is often reported, weighs a token by the company it is in: it changes with the batch size
and with the order. Here losses are summed per sample and divided once by the number of target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorakeet.errors import DataError
from lorakeet.patches.causal_loss import sample_losses
from lorakeet.tasks.metrics import loss_and_perplexity

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


def _world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    collator: Collator,
    batch_size: int = 8,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float | int]:
    """Mean loss per target token (end token included) of a causal language model, and its perplexity.

    Samples go longest first, so that little padding is computed and a lack of memory shows at once. Under several
    processes each takes its share and all return the same figures. Training mode and random state are left as found.

    Args:
        model: A causal language model of transformers, with an adapter or without.
        dataset: Rows with ``input_ids`` (a ``datasets.Dataset`` or any sequence).
        collator: Makes a batch with ``labels`` out of rows.
        batch_size: Rows per forward pass.
        progress: Called after each batch with rows done and rows in all (of this process).

    Returns:
        ``{"loss", "perplexity", "tokens"}``; loss in nats per token.

    Raises:
        DataError: there are no rows, or no row has a target.
    """
    if not len(dataset):
        raise DataError("there is nothing to evaluate: the data has no samples", "give data with rows")
    lengths = [len(row["input_ids"]) for row in dataset]
    rank, world = _world()
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))[rank::world]
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)  # loss, targets
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = collator([dict(dataset[i]) for i in order[start : start + batch_size]])
            batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
            losses, targets = sample_losses(model, batch)
            sums += torch.stack([losses.cpu().double().sum(), targets.cpu().double().sum()])
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
    if world > 1:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
    if not sums[1]:
        raise DataError(
            "there is nothing to evaluate: no token of the data is a target", "check data.learn and data.max_length"
        )
    return loss_and_perplexity(float(sums[0]), int(sums[1]))
