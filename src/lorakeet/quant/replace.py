"""Quantized layers in place of the dense ones of a model in memory, with shared weights kept shared."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakeet.quant.layer_selection import vocabulary_layers
from lorakeet.quant.protocol import QuantizedLayer, QuantizedWeight


@dataclass(frozen=True)
class QuantizedFormat:
    """A way of storing weights in fewer bits.

    Attributes:
        quantize: Takes a dense weight [out, in], and whether each row belongs to a token.
        layer: Takes the dense layer and its quantized weight, and builds the layer that replaces it.
        placeholder: Takes the shape (out, in), and whether each row belongs to a token; builds a weight of
            the format on the meta device.
    """

    quantize: Callable[[Tensor, bool], QuantizedWeight]
    layer: Callable[[nn.Module, QuantizedWeight], QuantizedLayer]
    placeholder: Callable[[tuple[int, int], bool], QuantizedWeight]


@torch.no_grad()
def replace_layers_(model: PreTrainedModel, layers: Mapping[str, nn.Module], form: QuantizedFormat) -> None:
    """Quantize ``layers`` of ``model`` in place, one after the other; layers that share a weight share the quantized one.

    Args:
        model: Has its weights in memory.
        layers: Dense layers of ``model`` by name.
        form: The format to store them in.
    """
    quantized: dict[int, QuantizedWeight] = {}
    parameters: dict[int, dict[str, nn.Parameter | None]] = {}
    vocabulary = vocabulary_layers(model)
    for name, layer in layers.items():
        dense: Any = layer.weight
        if id(dense) not in quantized:
            weight = dense.detach().T.contiguous() if isinstance(layer, Conv1D) else dense.detach()
            quantized[id(dense)] = form.quantize(weight, name in vocabulary)
        made = form.layer(layer, quantized[id(dense)])
        own = {leaf: made._parameters[leaf] for leaf in quantized[id(dense)].tensors()}
        made._parameters.update(
            parameters.setdefault(id(dense), own)
        )  # the very same parameters, where layers share them
        model.set_submodule(name, made)


def tie_tensors(model: PreTrainedModel, quantized: Container[str]) -> None:
    """Declare that quantized layers which share a weight share its scales too.

    `transformers` reads these declarations before it ties weights and before it saves them.
    """
    more: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        names = [key.removesuffix(".weight") for key in (target, source)]
        if all(name in quantized for name in names):
            layer: Any = model.get_submodule(names[1])
            leaves = [leaf for leaf in layer.quantized_weight().tensors() if leaf != "weight"]
            more |= {f"{names[0]}.{leaf}": f"{names[1]}.{leaf}" for leaf in leaves}
    if more:
        model.all_tied_weights_keys |= more
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **more}


def dense_shape(layer: Any) -> tuple[int, int]:
    """Return the shape of a dense layer's weight as [out, in], or [vocabulary, width] for an embedding."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)
