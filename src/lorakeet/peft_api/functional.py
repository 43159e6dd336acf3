"""PEFT's functions on a model with adapters, for code that has no ``PeftModel``: most call the method of the same name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorakeet.adapter.serialization import read_tensors
from lorakeet.errors import AdapterError
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.lifecycle.adapter_files import CONFIG_NAME, find_adapter_file
from lorakeet.lora.model import LoraModel


def _adapted(model: Any) -> LoraModel:
    if not isinstance(model, LoraModel):
        raise AdapterError("this model has no adapter", "inject_adapter_in_model or get_peft_model first")
    return model


def set_adapter(
    model: Any, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Activate one adapter, or the sum of several.

    Args:
        model: A model with the adapters.
        adapter_name: Their names.
        inference_mode: Whether they stay frozen.
        layer_cls: Accepted for code written for PEFT, without effect.
    """
    _adapted(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: Any, adapter_name: str, prefix: str = "lora_", layer_cls: Any = None) -> list[str] | None:
    """Delete an adapter; returns the adapters that are active then.

    Args:
        model: A model with the adapter.
        adapter_name: Its name.
        prefix: Accepted for code written for PEFT, without effect.
        layer_cls: The same.
    """
    adapted = _adapted(model)
    adapted.delete_adapter(adapter_name)
    return adapted.active_adapters or None


def set_requires_grad(model: Any, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters trainable, or freeze them, whether they are active or not."""
    _adapted(model).set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: Any, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Store an adapter that is in half precision in fp32; nothing happens without ``autocast_adapter_dtype``."""
    for parameter in _adapted(model).adapter_parameters(adapter_name) if autocast_adapter_dtype else ():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


@contextmanager
def rescale_adapter_scale(model: Any, multiplier: float) -> Iterator[None]:
    """Multiply s of all adapters inside the block.

    Raises:
        AdapterError: The model has no adapter, or the multiplier is no number.
    """
    if not isinstance(multiplier, (int, float)):
        raise AdapterError(f"the multiplier is a {type(multiplier).__name__}, expected a number")
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if not layers:
        raise AdapterError("scaling is only supported for models with LoRA layers, and this one has none", "add one")
    before = [(layer, dict(layer.scaling)) for layer in layers]
    for layer in layers:
        for adapter in layer.scaling:
            layer.scaling[adapter] = layer.scaling[adapter] * multiplier
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether a folder or hub id is that of an adapter."""
    try:
        return find_adapter_file(model_name_or_path, CONFIG_NAME) is not None
    except AdapterError:
        return False


def load_peft_weights(model_id: str | Path, device: str | None = None, **where: Any) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter by the keys of its file.

    Args:
        model_id: Folder or hub id.
        device: Device to put them on; left out: that of :func:`infer_device`.
        **where: ``revision``, ``subfolder``, and the arguments of a download.
    """
    return {key: tensor.to(device or infer_device()) for key, tensor in read_tensors(model_id, **where).items()}


def infer_device() -> str:
    """Return the device that a model is usually put on here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
