"""Files of PEFT's methods beside LoRA, as settings and tensors of a variant here, and back.

AdaLoRA is a method of its own in PEFT (``peft_type`` ADALORA). The fields of :class:`~lorakeet.config.AdaLoraConfig` are keys
of the file there. ``rank_pattern`` lists for each layer which triplets are left, and A and B have no ``.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorakeet.config import AdaLoraConfig
from lorakeet.errors import ConfigError

#: The method of a file without ``peft_type``, and of all variants that PEFT has as settings of LoRA.
LORA = "LORA"
ADALORA = "ADALORA"
#: End of the key of a tensor in a file of AdaLoRA -> the dimension of the rank.
_RANKS = {"lora_A": 0, "lora_B": 1, "lora_E": 0}


def as_lora(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an adapter's file as those of LoRA with a variant.

    Raises:
        ConfigError: The file is of a method that Lorakeet does not have.
    """
    method = values.get("peft_type", LORA)
    if method == LORA:
        return dict(values)
    if method != ADALORA:
        raise ConfigError(f"this adapter is of type {method!r}, expected {LORA!r} or {ADALORA!r}")
    own = {key: values[key] for key in AdaLoraConfig.model_fields if key in values}
    others = {key: value for key, value in values.items() if key not in own}
    adalora = AdaLoraConfig(**own)
    ranks = {_layer(key): _count(kept) for key, kept in (values.get("rank_pattern") or {}).items()}
    # PEFT reads neither r nor a pattern of alphas; a layer without any triplet left is one triplet of zeros here
    return {
        **others,
        "peft_type": LORA,
        "r": adalora.init_r,
        "adalora_config": adalora,
        "alpha_pattern": {},
        "rank_pattern": {name: max(rank, 1) for name, rank in ranks.items()},
    }


def _layer(key: str) -> str:
    """Return the layer of a key of ``rank_pattern``, which names its singular values, in some files with the adapter."""
    return key.partition(".lora_E")[0]


def _count(kept: Any) -> int:
    """Return the number of triplets that a list of PEFT keeps.

    Raises:
        ConfigError: It is no list of true and false.
    """
    if isinstance(kept, list) and all(isinstance(each, bool) for each in kept):
        return sum(kept)
    raise ConfigError(f"rank_pattern of an AdaLoRA adapter has {kept!r}, expected a list of true and false")


def as_method(values: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of an adapter's file in the form of PEFT's method that it is."""
    adalora = values.pop("adalora_config", None)
    if adalora is None:
        return values
    ranks = {
        f"{name}.lora_E": [i < rank for i in range(adalora["init_r"])] for name, rank in values["rank_pattern"].items()
    }
    return dict(sorted({**values, **adalora, "peft_type": ADALORA, "r": 8, "rank_pattern": ranks or None}.items()))


def tensors_as_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file of any method by the keys of LoRA; an empty triplet becomes one of zeros."""
    named = {re.sub(r"\.(lora_[AB])$", r".\1.weight", key): tensor for key, tensor in tensors.items()}
    return {key: _not_empty(key, tensor) for key, tensor in named.items()}


def _not_empty(key: str, tensor: Tensor) -> Tensor:
    dim = next((dim for end, dim in _RANKS.items() if f".{end}" in key), None)
    if tensor.numel() or dim is None or tensor.ndim != 2 or tensor.shape[dim]:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = 1
    return torch.zeros(shape, dtype=tensor.dtype)


def tensors_as_method(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return an adapter's tensors by the keys of PEFT's method.

    Args:
        tensors: By the keys of LoRA.
        names: The names of the variant's own parameters.
    """
    if "lora_E" not in names:
        return dict(tensors)
    return {re.sub(r"\.(lora_[AB])\.weight$", r".\1", key): tensor for key, tensor in tensors.items()}
