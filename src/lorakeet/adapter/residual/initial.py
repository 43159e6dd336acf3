"""The initial tensors of an adapter that took a part of its base, and the check that a file's settings say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakeet.adapter.serialization import read_tensors
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.conversion import initial_tensors
from lorakeet.lora.initialization.taken_part import holds_parts, takes_part
from lorakeet.lora.interop.wrappers import canonical
from lorakeet.lora.model import LoraModel


def initial_of(
    model: LoraModel, adapter: str, saved: str | Path | None, plain_lora: bool
) -> Mapping[str, Tensor] | None:
    """Return the tensors that an adapter had before its training, by the keys of its file; None: it is saved as it is.

    Args:
        model: A model with the adapter.
        adapter: The adapter.
        saved: Folder where it was saved before its training, if the caller has one.
        plain_lora: Whether to take them from the model, which remembers what the adapter took.

    Raises:
        AdapterError: There is no adapter in ``saved``.
    """
    if saved is not None:
        return read_tensors(saved)
    if not plain_lora or not holds_parts(model, adapter):
        return None
    layers = {PREFIX + canonical(name): layer for name, layer in model.named_modules()}
    return initial_tensors(layers, adapter)


def warn_of_residual(name: str | Path, config: PeftConfig, notes: Mapping[str, Any]) -> None:
    """Warn of an adapter whose residual cannot be made again from the base and the adapter's settings.

    Args:
        name: Folder or hub id, for messages.
        config: Its settings.
        notes: Its ``lorakeet.json``; empty if another tool made it.
    """
    how = config.init_lora_weights
    if notes.get("on_residual") and not (takes_part(how) or config.variant.takes_part):
        warn(
            f"adapter {str(name)!r} was saved for a base without the part that it took, and its settings say "
            f"init_lora_weights={how!r}, which takes none: its answers will be wrong; is it the one from before the training?"
        )
    elif isinstance(how, str) and how.startswith("pissa_niter_") and not notes:
        warn(
            f"adapter {str(name)!r} was made by another tool with {how}, whose random numbers decide the rest of the base: "
            "its answers may differ here; let that tool convert it to plain LoRA"
        )
