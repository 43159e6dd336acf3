"""Layers of a base in memory, rounded in place; and a vocabulary that is rounded, and resized all the same."""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakeet.errors import BaseModelError
from lorakeet.quant.int8 import Int8Embedding, Int8Linear, round_weight, rounded_like, vocabulary_layers


@torch.no_grad()
def round_in_place(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> None:
    """Put 8-bit layers in the places of these, by name. Layers that share a weight share the rounded one."""
    shared: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    vocabulary = vocabulary_layers(model)
    for name, layer in layers.items():
        dense: Any = layer
        if id(dense.weight) not in shared:
            weight, scale = round_weight(dense.weight.detach(), isinstance(layer, Conv1D), name in vocabulary)
            shared[id(dense.weight)] = (nn.Parameter(weight, False), nn.Parameter(scale, False))
        made = rounded_like(layer, *shared[id(dense.weight)], dense.weight.dtype)
        made.weight, made.scale = shared[id(dense.weight)]  # the very same parameters, where layers share them
        model.set_submodule(name, made)


def tie_scales(model: PreTrainedModel, rounded: Container[str]) -> None:
    """Layers that share a weight share its scales: said where `transformers` looks before it ties, and before it saves."""
    more = {}
    for target, source in model.all_tied_weights_keys.items():
        names = [key.removesuffix(".weight") for key in (target, source)]
        if all(name in rounded for name in names):
            more[f"{names[0]}.scale"] = f"{names[1]}.scale"
    if more:
        model.all_tied_weights_keys |= more
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **more}


def resizable(model: PreTrainedModel) -> None:
    """Let ``model.resize_token_embeddings`` go through :func:`resize`, where the vocabulary is rounded."""
    if _rounded_vocabulary(model):
        model.resize_token_embeddings = functools.partial(resize, model)


def _rounded_vocabulary(model: PreTrainedModel) -> dict[str, Int8Linear | Int8Embedding]:
    layers = {name: model.get_submodule(name) for name in vocabulary_layers(model)}
    return {name: layer for name, layer in layers.items() if isinstance(layer, (Int8Linear, Int8Embedding))}


@torch.no_grad()
def resize(model: PreTrainedModel, *args: Any, **settings: Any) -> nn.Embedding:
    """``resize_token_embeddings`` of `transformers`, with its arguments: new rows are rounded, old ones stay as they are.

    Raises:
        BaseModelError: the rounded embedding or head is held elsewhere (``device_map``).
    """
    rounded = _rounded_vocabulary(model)
    if any(layer.weight.is_meta or hasattr(layer, "_hf_hook") for layer in rounded.values()):
        raise BaseModelError(
            "a rounded embedding whose weight a device map moves about cannot be resized",
            "resize the full base before it is rounded, or use Int8Config(embeddings=False)",
        )
    ties = {name: getattr(model, name) for name in ("all_tied_weights_keys", "_tied_weights_keys")}
    for name, layer in rounded.items():
        model.set_submodule(name, layer.dequantized())
    for name, keys in ties.items():  # plain layers have no scales
        setattr(model, name, {key: source for key, source in (keys or {}).items() if not key.endswith(".scale")})
    try:
        type(model).resize_token_embeddings(model, *args, **settings)
    except Exception:
        for name, old in rounded.items():
            model.set_submodule(name, old)
        raise
    finally:
        for name, keys in ties.items():
            setattr(model, name, keys)
    round_in_place(model, {name: model.get_submodule(name) for name in rounded})  # gives old rows their bytes again
    return model.get_input_embeddings()  # type: ignore[return-value]
