"""A language model's loss without its logits.

The model's own forward runs as it is written, but for two moments. Where it calls its head, the head's input is kept and
a few numbers are returned in place of the logits. Where it then calls its loss function, what it has done to these numbers
(nothing, a scale, a soft-cap) shows whether the loss that is computed in chunks is the model's own
(:mod:`lorakeet.kernels.linear_cross_entropy`); if not, the forward pass is repeated with all logits, and that is said.
So labels, masks, caches and outputs are the model's business, and under DDP all of it happens inside the wrapped forward.
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
from lorakeet.patches.causal_loss import asks_loss_function, sample_losses

#: What stands in for the logits of one position. Exact in bf16; large enough to meet any cap.
_PROBE = (-96.0, -24.0, -5.0, -1.5, -0.25, 0.0, 0.5, 1.0, 3.0, 12.0, 40.0, 128.0)

#: Language models whose loss is computed without logits at this moment.
_WITHOUT_LOGITS: WeakSet[nn.Module] = WeakSet()


class _UnknownLossError(Exception):
    """The model does something between head and loss that the fused loss does not know."""


def why_not_fused(model: nn.Module) -> str | None:
    """Why :func:`fused_loss` would not help a model, in half a sentence; None if it would."""
    lm = _language_model(model)
    if lm is None:
        return "it has no language-modelling head"
    kind = type(lm).__name__
    if hasattr(lm, "_loss_function"):
        return f"{kind} was given a loss function of its own"
    if asks_loss_function(lm):
        if lm.loss_function not in (ForCausalLMLoss, ForMaskedLMLoss):
            return f"the loss of {kind} is not known"
    elif not kind.endswith("ForMaskedLM"):
        return f"{kind} computes its loss inside its forward"
    if hasattr(_head(lm), "unshard"):
        return "its head is sharded on its own, and processes with fewer targets would call it less often"
    return None


def _language_model(model: nn.Module) -> PreTrainedModel | None:
    """The outermost model of transformers, if it has a head over the vocabulary."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module if module.get_output_embeddings() is not None else None
    return None


def _head(lm: PreTrainedModel) -> nn.Module:
    return cast(nn.Module, lm.get_output_embeddings())


@contextmanager
def fused_loss(model: nn.Module) -> Iterator[None]:
    """While this holds, ``model(**inputs, labels=...)`` in training mode returns its loss and no logits.

    Same loss and gradients as the model's own: mean over the targets, or their sum over ``num_items_in_batch``; also with
    an adapter on the head or a head that learns. Without any target the loss is a 0 that is part of the graph. In
    evaluation mode, without labels, or with ``return_dict=False`` the model answers as it always does; so does one that
    :func:`why_not_fused` has a reason against.
    """
    lm = _language_model(model)
    if lm is None or why_not_fused(model):
        yield
        return
    own = lm.__dict__.get("forward")
    before = lm.forward

    @wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        learns = lm.training and kwargs.get("labels") is not None and kwargs.get("return_dict") is not False
        if learns and lm in _WITHOUT_LOGITS:
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
    """Whether training a model makes all logits of its batches: a language model outside of :func:`fused_loss`."""
    lm = _language_model(model)
    return lm is not None and lm not in _WITHOUT_LOGITS


def _without_logits(lm: PreTrainedModel, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Runs a forward with labels; returns its output with ``loss`` and no ``logits``."""
    head = _head(lm)
    losses: list[Tensor] = []
    shifted = asks_loss_function(lm) and lm.loss_function is ForCausalLMLoss

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
        rows, wanted = _targets(seen.only(), labels, ignore_index)
        total = linear_cross_entropy(rows, wanted, head, list(head.parameters()), logit_map)
        count = max(len(wanted), 1) if num_items_in_batch is None else num_items_in_batch
        losses.append(total / (count.to(total.device) if torch.is_tensor(count) else count))
        return losses[-1]

    with _stand_in(head) as seen:
        if not asks_loss_function(lm):
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


class _Seen(list[Tensor]):
    """What a head was given."""

    def only(self) -> Tensor:
        if len(self) != 1:
            raise _UnknownLossError(f"the head was called {len(self)} times")
        return self[0]


@contextmanager
def _stand_in(head: nn.Module) -> Iterator[_Seen]:
    """The next call of ``head`` keeps its input and returns the probe; after it the head is itself again."""
    own, seen = head.__dict__.get("forward"), _Seen()

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
    """What the model does to logits, by its configuration; the probe that went through the model must agree."""
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
    """[B, T] -> [B, T]: what each position has to predict."""
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _targets(hidden: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """[B, T, H] and [B, T] -> [n, H] and [n]: positions that have something to predict."""
    if hidden.shape[:-1] != labels.shape:
        raise _UnknownLossError(f"the head got {tuple(hidden.shape[:-1])} positions, the loss {tuple(labels.shape)}")
    flat = labels.reshape(-1).to(hidden.device)
    places = flat.ne(ignore_index).nonzero()[:, 0]
    return hidden.flatten(0, -2).index_select(0, places), flat[places]


@torch.no_grad()
def fused_sample_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """As :func:`lorakeet.patches.causal_loss.sample_losses`, without ever holding all logits.

    Returns:
        Summed loss and number of targets of each row of a causal language model's batch: [B] fp32 and [B] int64.
    """
    lm = _language_model(model)
    if lm is None or why_not_fused(model):
        return sample_losses(model, batch)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    head, targets = _head(lm), batch.get("shift_labels")
    try:
        with _stand_in(head) as seen:
            logits = model(**inputs, use_cache=False).logits
        logit_map = _checked_map(lm, logits)
        targets = _shift(batch["labels"]) if targets is None else targets
        rows, wanted = _targets(seen.only(), targets)
    except _UnknownLossError:
        return sample_losses(model, batch)
    mask = targets.ne(IGNORE_INDEX).to(rows.device)
    losses = torch.zeros(mask.shape, dtype=torch.float32, device=rows.device)
    losses[mask] = row_losses(rows, wanted, head, logit_map)
    return losses.sum(1), mask.sum(1)
