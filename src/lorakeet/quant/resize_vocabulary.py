"""``resize_token_embeddings`` for a model whose embedding or head is quantized: old rows keep their bytes.

A vocabulary in 16 bits becomes fp32, since a new row is a mean, which has no 16 bits of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakeet.errors import BaseModelError
from lorakeet.quant.half import HalfEmbedding, HalfLinear, widen_
from lorakeet.quant.int8 import INT8
from lorakeet.quant.layer_selection import vocabulary_layers
from lorakeet.quant.protocol import QuantizedLayer, is_rounded
from lorakeet.quant.replace import replace_layers_


def enable_resizing(model: PreTrainedModel) -> None:
    """Route ``model.resize_token_embeddings`` through :func:`resize`, where the vocabulary is quantized."""
    if _quantized_vocabulary(model):
        model.resize_token_embeddings = functools.partial(resize, model)


def enable_resizing_of_halves(model: PreTrainedModel) -> None:
    """Make ``model.resize_token_embeddings`` widen the vocabulary first, where it is in 16 bits."""
    if any(isinstance(model.get_submodule(name), (HalfLinear, HalfEmbedding)) for name in vocabulary_layers(model)):
        model.resize_token_embeddings = functools.partial(_resize_widened, model)


@torch.no_grad()
def _resize_widened(model: PreTrainedModel, *args: Any, **settings: Any) -> nn.Embedding:
    widen_(model, vocabulary_layers(model))
    del model.resize_token_embeddings
    resized: nn.Embedding = model.resize_token_embeddings(*args, **settings)
    return resized


def _quantized_vocabulary(model: PreTrainedModel) -> dict[str, QuantizedLayer]:
    layers = {name: model.get_submodule(name) for name in vocabulary_layers(model)}
    return {name: layer for name, layer in layers.items() if is_rounded(layer)}


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
