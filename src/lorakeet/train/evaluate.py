"""Held-out loss: the mean over every target token, however the samples fall into batches.

A mean of batch means, as it is often reported, weighs a token by the company it is in: it changes with the batch size
and with the order. Here losses are summed per sample and divided once by the number of target tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lorakeet.data.collate import IGNORED
from lorakeet.errors import DataError

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

#: Positions whose logits are held in fp32 at once, for each row of a batch.
CHUNK = 128


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss is the plain next-token loss, where position ``t`` predicts label ``t + 1``."""
    kind = getattr(model, "loss_type", "")
    if kind is None:  # its name tells nothing (GPT2LMHeadModel): if its forward asks for a loss, it gets this one
        shifts = asks_loss_function(model)
    else:
        shifts = LOSS_MAPPING.get(kind) is ForCausalLMLoss
    return shifts and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def asks_loss_function(model: nn.Module) -> bool:
    """Whether a model's forward asks its ``loss_function``; others compute a loss themselves, or none."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()  # a wrapper's own forward says nothing
    try:
        return "self.loss_function(" in inspect.getsource(inspect.unwrap(type(inner).forward))
    except OSError:  # typed into a shell: nobody can read it
        return False


def count_targets(batch: Mapping[str, Any], shifted: bool) -> int:
    """Targets that a batch's loss is the mean of: unmasked labels, or samples where labels are not masked at all."""
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch.get("labels")
        labels = labels[..., 1:] if labels is not None and shifted else labels
    if not torch.is_tensor(labels):
        first = next((value for value in batch.values() if torch.is_tensor(value)), None)
        return 1 if first is None else len(first)
    return int(labels.ne(IGNORED).sum())


def sample_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Summed loss and number of targets of each row of a causal language model's batch.

    Returns:
        ``[B]`` fp32 and ``[B]`` int64. No more than :data:`CHUNK` positions of a row are in fp32 at a time.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    logits = model(**inputs, use_cache=False).logits  # [B, T, V]
    targets = batch.get("shift_labels")
    if targets is None:
        targets, logits = batch["labels"][:, 1:], logits[:, :-1]
    targets = targets.to(logits.device)
    total = torch.zeros(len(targets), dtype=torch.float32, device=logits.device)
    for start in range(0, targets.shape[1], CHUNK):
        some, wanted = logits[:, start : start + CHUNK].float(), targets[:, start : start + CHUNK]
        picked = some.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
        # not F.cross_entropy: on a CPU it adds a vocabulary up one by one and is low by 1e-4 a token
        losses = some.logsumexp(-1) - picked  # [B, ≤CHUNK]
        total += losses.masked_fill(wanted.eq(IGNORED), 0.0).sum(1)
    return total, targets.ne(IGNORED).sum(1)


def loss_and_perplexity(total: float, tokens: int) -> dict[str, float | int]:
    """``{"loss", "perplexity", "tokens"}`` from a sum of losses; perplexity is exp(loss)."""
    loss = total / tokens if tokens else math.nan
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}


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
        raise DataError("there is nothing to evaluate: the data has no samples")
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
        raise DataError("there is nothing to evaluate: no token of the data is a target")
    return loss_and_perplexity(float(sums[0]), int(sums[1]))
