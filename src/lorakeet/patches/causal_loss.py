"""Loss of a causal language model: label shift, targets of a batch, loss of each row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from lorakeet.ignore_index import IGNORE_INDEX

#: Positions of each row whose logits are in fp32 at once.
CHUNK = 128
#: Call in the forward of a model of transformers whose loss can be replaced.
_LOSS_CALL = "self.loss_function("


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss is the plain next-token loss, where position ``t`` predicts label ``t + 1``."""
    loss_type = getattr(model, "loss_type", "")
    if loss_type is None:  # not derived from the class name (GPT2LMHeadModel): `loss_function` is then this loss
        shifts = calls_loss_function(model)
    else:
        shifts = LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
    return shifts and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def calls_loss_function(model: nn.Module) -> bool:
    """Whether a model's forward calls ``self.loss_function``; other models compute a loss themselves, or none."""
    # Why the source is read: every PreTrainedModel has a `loss_function`, whether its forward calls it or not, and no
    # class attribute or signature tells which. Calling the model with a loss function of our own would tell. But it
    # costs a forward pass, and fails for models that need more inputs than token ids. A wrong answer only costs speed,
    # or is caught by the probe of `fused_loss`. Seen in transformers 5.18;
    # tests/patches/test_transformers_internals.py fails by name if the call is renamed.
    inner: Any = getattr(model, "get_base_model", lambda: model)()  # the forward of a wrapper does not call it
    return _names_loss_call(type(inner).forward)


@cache
def _names_loss_call(forward: Callable[..., Any]) -> bool:
    """Whether the source of a forward has the call; reading it takes milliseconds, and every pass asks."""
    try:
        return _LOSS_CALL in inspect.getsource(inspect.unwrap(forward))
    except OSError:  # defined in an interactive shell, so there is no source
        return False


def count_targets(batch: Mapping[str, Any], shifted: bool) -> int:
    """Count the targets that a batch's loss is the mean of: unmasked labels, or samples where labels are never masked.

    Labels of fractions are never masked: they are numbers, or one mark for each class.
    """
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch.get("labels")
        labels = labels[..., 1:] if labels is not None and shifted else labels
    if not torch.is_tensor(labels):
        first = next((value for value in batch.values() if torch.is_tensor(value)), None)
        return 1 if first is None else len(first)
    return len(labels) if labels.is_floating_point() else int(labels.ne(IGNORE_INDEX).sum())


def sample_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return summed loss and number of targets of each row of a causal language model's batch.

    Returns:
        ``[B]`` fp32 and ``[B]`` int64. At most :data:`CHUNK` positions of a row are in fp32 at a time.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    logits = model(**inputs, use_cache=False).logits  # [B, T, V]
    targets = batch.get("shift_labels")
    if targets is None:
        targets, logits = batch["labels"][:, 1:], logits[:, :-1]
    targets = targets.to(logits.device)
    total = torch.zeros(len(targets), dtype=torch.float32, device=logits.device)
    for start in range(0, targets.shape[1], CHUNK):
        chunk, labels = logits[:, start : start + CHUNK].float(), targets[:, start : start + CHUNK]
        picked = chunk.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        # not F.cross_entropy: on a CPU it sums a vocabulary one by one, which is low by 1e-4 per token
        losses = chunk.logsumexp(-1) - picked  # [B, ≤CHUNK]
        total += losses.masked_fill(labels.eq(IGNORE_INDEX), 0.0).sum(1)
    return total, targets.ne(IGNORE_INDEX).sum(1)
