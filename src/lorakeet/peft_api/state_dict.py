"""PEFT's functions for state dicts: an adapter's tensors by the keys of its file, and the base's by the base's own keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.adapter.serialization import adapter_tensors
from lorakeet.adapter.tensor_loading import LoadResult, put_tensors
from lorakeet.adapter.tensor_names import PREFIX, SHARED
from lorakeet.errors import AdapterError
from lorakeet.log import warn
from lorakeet.lora.inject import OWN
from lorakeet.lora.interop.peft_methods import tensors_as_lora, tensors_as_method
from lorakeet.lora.model import LoraModel
from lorakeet.lora.peft_names.model import reallocate


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the keys of its file.

    Args:
        model: A model with the adapter. After ``inject_adapter_in_model`` the keys begin with the layer's name, without
            ``base_model.model.``, as in PEFT.
        state_dict: The model's state dict, if it was gathered from several processes.
        adapter_name: The adapter.
        unwrap_compiled: Whether ``model`` is compiled.
        save_embedding_layers: Whether to add the embedding and the head; ``auto``: if they are adapted or were resized.

    Raises:
        AdapterError: the model has no such adapter.
    """
    model = _checked(getattr(model, "_orig_mod", model) if unwrap_compiled else model, adapter_name)
    own = adapter_tensors(model, adapter_name, state_dict, save_embedding_layers)
    tensors = tensors_as_method(own, model.peft_config[adapter_name].variant.parameters)
    if isinstance(model, PeftModel):
        return tensors
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy the tensors of an adapter into the model.

    Args:
        model: A model with the adapter.
        peft_model_state_dict: The tensors by the keys of an adapter's file, with or without ``base_model.model.``.
        adapter_name: The adapter.
        ignore_mismatched_sizes: Leave out tensors of another shape, with a warning; otherwise they are an error.
        low_cpu_mem_usage: Accepted for code written for PEFT, without effect. An adapter on the meta device gets memory.

    Returns:
        The keys that the tensors lack, and those that the model lacks. Either is also a warning.

    Raises:
        AdapterError: the model has no such adapter; a tensor has another shape, or NaN or infinite values.
    """
    given = tensors_as_lora(peft_model_state_dict)
    tensors = {key if key.startswith(SHARED) else PREFIX + key: tensor for key, tensor in given.items()}
    model = _checked(model, adapter_name)
    if any(parameter.is_meta for parameter in model.adapter_parameters(adapter_name)):
        reallocate(model, adapter_name)
    result = put_tensors(model, adapter_name, tensors, skip_shapes=ignore_mismatched_sizes)
    for kind, keys in zip(("missing", "unexpected"), result, strict=True):
        if keys:
            warn(f"tensors of adapter {adapter_name!r}: {len(keys)} {kind} ({', '.join(keys[:5])})")
    return result


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """Return the base's tensors by the base's own keys, as if it had no adapter."""
    state = model.state_dict()
    return {own: state[key] for own, key in _base_keys(model).items()}


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Copy the base's tensors into a model with adapters.

    Args:
        model: The model.
        state_dict: The tensors by the base's own keys.
        strict: Whether a key that is missing or unknown is an error.

    Returns:
        Missing and unknown keys.

    Raises:
        AdapterError: with ``strict``, a key is missing or unknown.
    """
    own = _base_keys(model)
    missing, unknown = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if strict and (missing or unknown):
        raise AdapterError(f"state dict of the base: missing keys {missing[:5]}, unexpected keys {unknown[:5]}")
    model.load_state_dict({own[key]: value for key, value in state_dict.items() if key in own}, strict=False)
    return LoadResult(missing, unknown)


def _base_keys(model: Any) -> dict[str, str]:
    """Map the base's own keys to those of the model with adapters."""
    keys = [key for key in model.state_dict() if not any(mark in f".{key}" for mark in OWN)]
    return {re.sub(r"\.(base_layer|original_module)(?=\.)", "", key): key for key in keys}


def _checked(model: Any, adapter: str) -> LoraModel:
    while not isinstance(model, LoraModel) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # DDP, FSDP
    if not isinstance(model, LoraModel):
        raise AdapterError(f"a {type(model).__name__} has no adapter", "call get_peft_model first")
    model._check_known(adapter)
    return model
