"""Loss of a language model without its logits.

The model's own forward runs with two changes. Where it calls its head, the head's input is kept, and a few probe values
are returned in place of the logits. Where it calls its loss function, these values are compared with those that the loss
in chunks expects (unchanged, scaled or soft-capped; :mod:`lorakeet.kernels.linear_cross_entropy`). If they differ, the
forward pass is repeated with all logits, and a message says so. Labels, masks, caches and outputs stay with the model,
and under DDP everything happens inside the wrapped forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.kernels.linear_cross_entropy import LogitMap, linear_cross_entropy, row_losses
from lorakeet.log import info
from lorakeet.patches.causal_loss import calls_loss_function, sample_losses

#: Probe values in place of the logits of one position: exact in bf16, and large enough to reach any soft-cap.
_PROBE = (-96.0, -24.0, -5.0, -1.5, -0.25, 0.0, 0.5, 1.0, 3.0, 12.0, 40.0, 128.0)

#: Language models whose loss is currently computed without logits.
_WITHOUT_LOGITS: WeakSet[nn.Module] = WeakSet()


class _UnknownLossError(Exception):
    """The model changes logits between head and loss in a way that the fused loss does not compute."""


def why_not_fused(model: nn.Module) -> str | None:
    """Return why :func:`fused_loss` does not apply to a model, in half a sentence; None if it does."""
    lm = _language_model(model)
    if lm is None:
        return "it has no language-modelling head"
    name = type(lm).__name__
    if hasattr(lm, "_loss_function"):
        return f"{name} was given a loss function of its own"
    if calls_loss_function(lm):
        if lm.loss_function not in (ForCausalLMLoss, ForMaskedLMLoss):
            return f"the loss of {name} is not known"
    elif not name.endswith("ForMaskedLM"):
        return f"{name} computes its loss inside its forward"
    if hasattr(_head(lm), "unshard"):
        return "its head is sharded on its own, and processes with fewer targets would call it less often"
    return None


def _language_model(model: nn.Module) -> PreTrainedModel | None:
    """Return the outermost model of transformers, if it has a head over the vocabulary."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module if module.get_output_embeddings() is not None else None
    return None


def _head(lm: PreTrainedModel) -> nn.Module:
    return cast(nn.Module, lm.get_output_embeddings())


@contextmanager
def fused_loss(model: nn.Module) -> Iterator[None]:
    """Make ``model(**inputs, labels=...)`` return its loss without logits while it is in training mode.

    Loss and gradients are the model's own: the mean over the targets, or their sum over ``num_items_in_batch``. This
    includes an adapter on the head and a trainable head. Without any target the loss is a 0 that is part of the graph.
    In evaluation mode, without labels or with ``return_dict=False`` nothing changes, nor for a model that
    :func:`why_not_fused` excludes.
    """
    lm = _language_model(model)
    if lm is None or why_not_fused(model):
        yield
        return
    own = lm.__dict__.get("forward")
    before = lm.forward

    @wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        has_loss = lm.training and kwargs.get("labels") is not None and kwargs.get("return_dict") is not False
        if has_loss and lm in _WITHOUT_LOGITS:
            try:
                return _without_logits(lm, before, args, kwargs)
            except _UnknownLossError as reason:
                info(f"logits     are computed whole: {reason}")
                _WITHOUT_LOGITS.discard(lm)
        return before(*args, **kwargs)

    lm.forward = forward
    _WITHOUT_LOGITS.add(lm)
    try:
        yield
    finally:
        _WITHOUT_LOGITS.discard(lm)
        del lm.forward
        if own is not None:
            lm.forward = own


def computes_logits(model: nn.Module) -> bool:
    """Whether training a model computes all logits of its batches: a language model outside of :func:`fused_loss`."""
    lm = _language_model(model)
    return lm is not None and lm not in _WITHOUT_LOGITS


def _without_logits(lm: PreTrainedModel, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run a forward with labels; return its output with ``loss`` and without ``logits``."""
    head = _head(lm)
    losses: list[Tensor] = []
    shifted = calls_loss_function(lm) and lm.loss_function is ForCausalLMLoss

    def loss_function(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        logit_map = _checked_map(lm, logits)
        if shifted:
            labels = _shift(labels, ignore_index) if shift_labels is None else shift_labels
        hidden, targets = _targets(seen.only(), labels, ignore_index)
        total = linear_cross_entropy(hidden, targets, head, list(head.parameters()), logit_map, _weight(head))
        count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        losses.append(total / (count.to(total.device) if torch.is_tensor(count) else count))
        return losses[-1]

    with _probed(head) as seen:
        if not calls_loss_function(lm):
            output = forward(*args, **{**kwargs, "labels": None})
            output["loss"] = loss_function(output.logits, kwargs["labels"])
        else:
            lm.loss_function = loss_function
            try:
                output = forward(*args, **kwargs)
            finally:
                del lm._loss_function
    if len(losses) != 1:
        raise _UnknownLossError(f"{type(lm).__name__} did not call its loss function")
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})


def _weight(head: nn.Module) -> Tensor | None:
    """Return the weight of a head that is a plain product with it: no bias, hooks or forward of someone else; or None."""
    own = head.__dict__.get("forward")
    if type(head) is not nn.Linear or head.bias is not None or not (own is None or hasattr(own, "is_fused")):
        return None
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return None if any(hooks) else head.weight


class _HeadInputs(list[Tensor]):
    """Inputs of the calls of a head."""

    def only(self) -> Tensor:
        """Return the input of the one call."""
        if len(self) != 1:
            raise _UnknownLossError(f"the head was called {len(self)} times")
        return self[0]


@contextmanager
def _probed(head: nn.Module) -> Iterator[_HeadInputs]:
    """Make the next call of ``head`` keep its input and return the probe; later calls run as usual."""
    own, seen = head.__dict__.get("forward"), _HeadInputs()

    def restore() -> None:
        head.__dict__.pop("forward", None)
        if own is not None:
            head.forward = own

    def probe(x: Tensor) -> Tensor:
        restore()
        seen.append(x)
        return torch.tensor(_PROBE, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], -1)

    head.forward = probe
    try:
        yield seen
    finally:
        restore()


def _checked_map(lm: PreTrainedModel, logits: Tensor) -> LogitMap:
    """Return what the model does to logits by its configuration, if the probe that passed through the model agrees."""
    config = cast(Any, lm.config.get_text_config())
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logit_map = LogitMap(scale, getattr(config, "final_logit_softcapping", None))
    expected = logit_map(torch.tensor(_PROBE, dtype=logits.dtype, device=logits.device)).float()
    near = 8 * torch.finfo(logits.dtype).eps
    if logits.shape[-1] != len(_PROBE) or not torch.allclose(
        logits.float(), expected.expand(logits.shape), rtol=near, atol=near
    ):
        raise _UnknownLossError(f"{type(lm).__name__} changes them in a way that the fused loss does not know")
    return logit_map


def _shift(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return the label that each position predicts: [B, T] -> [B, T]."""
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _targets(hidden: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Return hidden states and labels of the targets: [B, T, H] and [B, T] -> [n, H] and [n]."""
    if hidden.shape[:-1] != labels.shape:
        raise _UnknownLossError(f"the head got {tuple(hidden.shape[:-1])} positions, the loss {tuple(labels.shape)}")
    flat = labels.reshape(-1).to(hidden.device)
    positions = flat.ne(ignore_index).nonzero()[:, 0]
    return hidden.flatten(0, -2).index_select(0, positions), flat[positions]


@torch.no_grad()
def fused_sample_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Compute :func:`lorakeet.patches.causal_loss.sample_losses` without holding all logits at once.

    Returns:
        Summed loss and number of targets of each row of a causal language model's batch: [B] fp32 and [B] int64.
    """
    lm = _language_model(model)
    if lm is None or why_not_fused(model):
        return sample_losses(model, batch)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    head, targets = _head(lm), batch.get("shift_labels")
    try:
        with _probed(head) as seen:
            logits = model(**inputs, use_cache=False).logits
        logit_map = _checked_map(lm, logits)
        targets = _shift(batch["labels"]) if targets is None else targets
        rows, wanted = _targets(seen.only(), targets)
    except _UnknownLossError:
        return sample_losses(model, batch)
    mask = targets.ne(IGNORE_INDEX).to(rows.device)
    losses = torch.zeros(mask.shape, dtype=torch.float32, device=rows.device)
    losses[mask] = row_losses(rows, wanted, head, logit_map, _weight(head))
    return losses.sum(1), mask.sum(1)
