"""Files of PEFT's methods beside LoRA, as settings and tensors of a variant here, and back.

VeRA's ``vera_lambda_b`` and ``vera_lambda_d`` are ``lora_lambda_b`` and ``lora_lambda_d`` here, and its dropout is LoRA's.

AdaLoRA is a method of its own in PEFT (``peft_type`` ADALORA). The fields of :class:`~lorakeet.config.AdaLoraConfig` are keys
of the file there. ``rank_pattern`` lists for each layer which triplets are left, and A and B have no ``.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorakeet.config import AdaLoraConfig, VeraConfig
from lorakeet.errors import ConfigError

#: The method of a file without ``peft_type``, and of all variants that PEFT has as settings of LoRA.
LORA = "LORA"
ADALORA = "ADALORA"
VERA = "VERA"
#: Settings of VeRA in PEFT -> those of LoRA.
_OF_VERA = {"vera_dropout": "lora_dropout", "init_weights": "init_lora_weights"}
#: Further keys that a file of VeRA has, by their names here.
_SHARED_KEYS = (
    *("r", "target_modules", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "layers_pattern", "task_type"),
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
)
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
    if method not in (ADALORA, VERA):
        raise ConfigError(f"this adapter is of type {method!r}, expected one of {LORA}, {ADALORA}, {VERA}")
    return _from_adalora(values) if method == ADALORA else _from_vera(values)


def _from_vera(values: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {own: values[key] for key, own in _OF_VERA.items() if key in values}
    vera = {key: values[key] for key in VeraConfig.model_fields if key in values}
    others = {key: value for key, value in values.items() if key not in vera and key not in _OF_VERA}
    bias = str(values.get("bias", "none")).replace("vera_only", "lora_only")
    return {**others, **renamed, "peft_type": LORA, "vera_config": VeraConfig(**vera), "bias": bias}


def _from_adalora(values: Mapping[str, Any]) -> dict[str, Any]:
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
    adalora, vera = values.pop("adalora_config", None), values.pop("vera_config", None)
    if vera is not None:
        named = {key: values[own] for key, own in _OF_VERA.items()} | {key: values[key] for key in _SHARED_KEYS}
        bias = values["bias"].replace("lora_only", "vera_only")
        return dict(sorted({**named, **vera, "bias": bias, "peft_type": VERA}.items()))
    if adalora is None:
        return values
    ranks = {
        f"{name}.lora_E": [i < rank for i in range(adalora["init_r"])] for name, rank in values["rank_pattern"].items()
    }
    return dict(sorted({**values, **adalora, "peft_type": ADALORA, "r": 8, "rank_pattern": ranks or None}.items()))


def tensors_as_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file of any method by the keys of LoRA; an empty triplet becomes one of zeros."""
    named = {
        re.sub(r"\.vera_lambda_([bd])$", r".lora_lambda_\1", re.sub(r"\.(lora_[AB])$", r".\1.weight", key)): tensor
        for key, tensor in tensors.items()
    }
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
    if "lora_lambda_b" in names:
        return {re.sub(r"\.lora_lambda_([bd])$", r".vera_lambda_\1", key): tensor for key, tensor in tensors.items()}
    if "lora_E" not in names:
        return dict(tensors)
    return {re.sub(r"\.(lora_[AB])\.weight$", r".\1", key): tensor for key, tensor in tensors.items()}
