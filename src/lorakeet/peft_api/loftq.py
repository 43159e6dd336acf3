"""PEFT's function for LoftQ on a base that is quantized already: the full weights are read from its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakeet.base.checkpoint_files import weight_reader
from lorakeet.base.source import find_source, local_folder
from lorakeet.errors import AdapterError
from lorakeet.lora.initialization.loftq import start_from_loss
from lorakeet.security.paths import exists


def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Let an adapter begin with what the quantized layers of its base lost of their full weights.

    Args:
        peft_model: A model with the adapter, on a quantized base.
        model_path: Folder of the base in full precision, or its safetensors file; left out: where the base was loaded from.
        adapter_name: The adapter.
        callback: Function of the model and a layer's name, called after each layer: whether its new A and B stay.

    Raises:
        AdapterError: No layer of the base is quantized, or a weight is not in the files.
    """
    name = model_path or getattr(getattr(peft_model, "config", None), "_name_or_path", None)
    if not name:
        raise AdapterError("this base does not say where it was loaded from", "give model_path")
    path = Path(name)
    read = weight_reader(path if exists(path) else local_folder(find_source(str(name))), peft_model)
    keep = None if callback is None else lambda layer: callback(peft_model, layer)
    start_from_loss(peft_model, adapter_name, read, keep)
