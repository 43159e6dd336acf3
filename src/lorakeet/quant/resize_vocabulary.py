"""``resize_token_embeddings`` for a model whose embedding or head is quantized: old rows keep their bytes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakeet.errors import BaseModelError
from lorakeet.quant.int8 import INT8
from lorakeet.quant.layer_selection import vocabulary_layers
from lorakeet.quant.protocol import QuantizedLayer, is_quantized
from lorakeet.quant.replace import replace_layers_


def enable_resizing(model: PreTrainedModel) -> None:
    """Route ``model.resize_token_embeddings`` through :func:`resize`, where the vocabulary is quantized."""
    if _quantized_vocabulary(model):
        model.resize_token_embeddings = functools.partial(resize, model)


def _quantized_vocabulary(model: PreTrainedModel) -> dict[str, QuantizedLayer]:
    layers = {name: model.get_submodule(name) for name in vocabulary_layers(model)}
    return {name: layer for name, layer in layers.items() if is_quantized(layer)}


@torch.no_grad()
def resize(model: PreTrainedModel, *args: Any, **settings: Any) -> nn.Embedding:
    """Resize the vocabulary as transformers' ``resize_token_embeddings`` does.

    New rows are quantized, old ones keep their bytes. A row has its own scale, so
    that quantizing a dequantized row again gives the same bytes.

    Raises:
        BaseModelError: A device map moves the weight of the embedding or head about.
    """
    quantized = _quantized_vocabulary(model)
    if any(layer._parameters["weight"].is_meta or hasattr(layer, "_hf_hook") for layer in quantized.values()):  # type: ignore[union-attr]
        raise BaseModelError(
            "cannot resize a quantized embedding whose weight a device map moves about",
            "resize the full base before quantizing it, or use Int8Config(embeddings=False)",
        )
    ties = {name: getattr(model, name) for name in ("all_tied_weights_keys", "_tied_weights_keys")}
    for name, layer in quantized.items():
        model.set_submodule(name, layer.dequantized())
    for name, keys in ties.items():  # plain layers have no scales
        setattr(model, name, {key: source for key, source in (keys or {}).items() if not key.endswith(".scale")})
    try:
        type(model).resize_token_embeddings(model, *args, **settings)
    except Exception:
        for name, old in quantized.items():
            model.set_submodule(name, old)
        raise
    finally:
        for name, keys in ties.items():
            setattr(model, name, keys)
    replace_layers_(model, {name: model.get_submodule(name) for name in quantized}, INT8)
    return model.get_input_embeddings()  # type: ignore[return-value]
