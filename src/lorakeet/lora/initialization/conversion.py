"""Conversion of an adapter that took a part of its base's weight to plain LoRA on the whole weight.

Trained, the weight is W_res + s·B·A, where W_res = W − s·B₀·A₀. Relative to W that is

    ΔW = s·(B·A − B₀·A₀) = s·[B, −B₀]·[A; A₀]

an adapter of rank 2r that every tool loads on the unchanged base. α is changed so that s stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import AdapterError
from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.taken_part import taken_parts

#: Ends of the keys of A and B, in a file -> the dimension of the rank.
_RANKS = {".lora_A.weight": 0, ".lora_B.weight": 1, ".lora_embedding_A": 0, ".lora_embedding_B": 1}


def initial_tensors(layers: Mapping[str, Any], adapter: str) -> dict[str, Tensor]:
    """Return the A₀ and B₀ that an adapter took, by the keys of A and B in its file.

    Args:
        layers: LoRA layers, by the beginning of their keys in the file.
        adapter: The adapter.
    """
    found = {key: part for key, layer in layers.items() if (part := taken_parts(layer).get(adapter))}
    return {f"{key}.{name}.weight": getattr(part, name) for key, part in found.items() for name in ("lora_A", "lora_B")}


def to_plain_lora(
    config: PeftConfig, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return settings and tensors of the plain LoRA adapter that answers on the whole base as this one on its residual.

    Args:
        config: Settings of the adapter.
        tensors: Its tensors, by the keys of its file.
        initial: A₀ and B₀ by the same keys; layers without any took nothing, and get zeros there.

    Raises:
        AdapterError: The adapter is of a variant whose update is no B·A, or ``initial`` has tensors of other shapes.
    """
    if not config.variant.additive:
        raise AdapterError(f"a {config.variant.name} adapter has no form as plain LoRA", "save it as it is")
    converted = dict(tensors)
    for key, tensor in tensors.items():
        if (end := next((end for end in _RANKS if key.endswith(end)), None)) is None:
            continue
        first = initial.get(key, torch.zeros_like(tensor))
        if first.shape != tensor.shape:
            raise AdapterError(
                f"the initial {key} is {list(first.shape)}, expected {list(tensor.shape)} as in the trained adapter",
                "give the folder where this adapter was saved before its training",
            )
        sign = -1 if _RANKS[end] else 1  # of B
        converted[key] = torch.cat([tensor, sign * first.to(tensor.device, tensor.dtype)], dim=_RANKS[end])
    if initial and all(
        torch.equal(tensors[key], first.to(tensors[key])) for key, first in initial.items() if key in tensors
    ):
        warn("the adapter is as before its training, so as plain LoRA it changes nothing")
    return _doubled(config), converted


def _doubled(config: PeftConfig) -> PeftConfig:
    """Return the settings with twice the rank and the same s, for an adapter that begins as usual."""
    factor = math.sqrt(2) if config.use_rslora else 2
    update = {
        "init_lora_weights": True,
        "r": 2 * config.r,
        "lora_alpha": factor * config.lora_alpha,
        "rank_pattern": {name: 2 * r for name, r in config.rank_pattern.items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in config.alpha_pattern.items()},
    }
    return config.model_copy(update=update)
