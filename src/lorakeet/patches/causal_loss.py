"""The loss of a causal language model: whether labels are shifted, targets of a batch, loss of each row."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lorakeet.ignore_index import IGNORE_INDEX

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
    return int(labels.ne(IGNORE_INDEX).sum())


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
        total += losses.masked_fill(wanted.eq(IGNORE_INDEX), 0.0).sum(1)
    return total, targets.ne(IGNORE_INDEX).sum(1)
