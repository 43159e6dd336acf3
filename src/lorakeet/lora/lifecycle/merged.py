"""The one guard of the methods that change adapters, for models that are merged.

A merged layer's weight holds the update. So before an adapter is added, replaced, saved or switched, the base's own weights
are put back. Where the change leaves the merged adapters alone, they are merged again afterwards. Where it does not, they
stay apart and a warning says so. Either way, the model answers as the adapters that are active then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import AdapterError
from lorakeet.log import warn


def merged_names(model: Any) -> list[str]:
    """Return the names of the merged adapters, in order."""
    return list(dict.fromkeys(name for layer in model.lora_layers() for name in layer.merged_adapters))


def take_apart(model: Any, action: str) -> None:
    """Unmerge with a warning, before an action that needs the adapters apart; nothing happens if none is merged."""
    if names := merged_names(model):
        warn(f"adapter {', '.join(names)} is unmerged first: {action}")
        _unmerge(model)


@contextmanager
def unmerged(model: Any) -> Iterator[None]:
    """Put the base's own weights back inside the block, and the very same merged weights afterwards.

    The adapters stay unmerged if the block activates others, or if it deletes or replaces one of them.
    """
    active = model.switch.active
    settings = {name: model.peft_config[name] for name in merged_names(model)}
    merged = [_Merged(layer) for layer in model.lora_layers() if layer.merged_adapters]
    _unmerge(model)
    try:
        yield
    finally:
        same = all(model.peft_config.get(name) is config for name, config in settings.items())
        if merged and same and model.switch.active == active:
            for layer in merged:
                layer.restore()


class _Merged:
    """Merged tensors of one layer."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.adapters, self.originals = layer, list(layer.merged_adapters), layer.originals
        self.tensors = {name: getattr(layer.base_layer, name) for name in layer.originals}

    def restore(self) -> None:
        """Put the merged tensors back; where the base's own changed meanwhile, merge again."""
        base = self.layer.base_layer
        if any(getattr(base, name) is not original for name, original in self.originals.items()):
            self.layer.merge_(self.adapters)
            return
        self.layer.originals = {name: getattr(base, name) for name in self.tensors}
        for name, tensor in self.tensors.items():
            setattr(base, name, tensor)
        self.layer.merged_adapters = self.adapters


def _unmerge(model: Any) -> None:
    for layer in model.lora_layers():
        if layer.merged_adapters:
            layer.unmerge_()


class _NoGradient(torch.autograd.Function):
    """Identity whose backward pass says why there is no gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, *parameters: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AdapterError(
            "an adapter is merged into the base, so training it would change nothing", "unmerge_adapter() first"
        )


def refuse_gradient(h: Any, parameters: Sequence[Tensor]) -> Any:
    """Return the output of a merged layer; a backward pass to it is an error if one of the parameters is trainable."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    if not learning or not torch.is_grad_enabled() or not isinstance(h, Tensor):
        return h
    return _NoGradient.apply(h, *learning)  # type: ignore[no-untyped-call]
