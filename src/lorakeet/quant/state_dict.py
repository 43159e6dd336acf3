"""Weights in state dicts, read and written as floating values whatever the format of the base.

Each function takes the model, whose layers know their formats, and a state dict with the model's keys. It may be the model's
own or one that was gathered from several processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakeet.quant.protocol import QuantizedWeight, is_quantized


def read_weight(model: nn.Module, state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the tensor of a state dict; of a quantized weight its values, fp32 [out, in]."""
    weight = _quantized(model, state, name)
    return state[name] if weight is None else weight.dequantize()


def stored_shape(model: nn.Module, state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape that :func:`read_weight` would give, without reading anything."""
    weight = _quantized(model, state, name)
    return tuple(state[name].shape) if weight is None else (weight.out_features, weight.in_features)


def has_weight(model: nn.Module, state: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    """Whether a state dict has this tensor under ``name``; in a quantized format: up to its rounding.

    Args:
        model: Knows which layers are quantized.
        state: With the model's keys.
        name: A key of ``state``.
        tensor: Dense values to compare with, on any device.
    """
    own, tensor = state[name], tensor.to(state[name].device)
    weight = _quantized(model, state, name)
    return torch.equal(own, tensor.to(own.dtype)) if weight is None else weight.is_rounding_of(tensor)


def write_weight(model: nn.Module, state: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    """Copy a dense tensor into a state dict's, quantized where that is.

    Args:
        model: Knows which layers are quantized.
        state: With the model's keys; its tensors are overwritten.
        name: A key of ``state``.
        tensor: Dense values, on any device.
    """
    weight = _quantized(model, state, name)
    if weight is None:
        state[name].copy_(tensor)
        return
    made = weight.requantize(tensor.to(state[name].device)).tensors()
    for leaf, own in weight.tensors().items():
        own.copy_(made[leaf])


def _quantized(model: nn.Module, state: Mapping[str, Tensor], name: str) -> QuantizedWeight | None:
    """Return the quantized weight whose tensors ``state`` has beside ``name``; None for any other tensor."""
    path, _, leaf = name.rpartition(".")
    try:
        layer = model.get_submodule(path)
    except AttributeError:  # a key that a wrapper renamed
        return None
    if leaf != "weight" or not is_quantized(layer):
        return None
    return layer.quantized_weight({key: state[f"{path}.{key}"] for key in layer.quantized_weight().tensors()})
