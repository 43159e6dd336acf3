"""Checks of a mixed batch, in which each row has its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakeet.errors import AdapterError
from lorakeet.lora.lifecycle.adapter_names import BARE
from lorakeet.lora.lifecycle.merged import merged_names
from lorakeet.lora.peft_names.words import NO_ROWS
from lorakeet.lora.target_parameters import LoraParameter


def check_mixed_batch(model: Any, adapter_names: Sequence[str]) -> None:
    """Refuse a mixed batch that cannot be run.

    Raises:
        AdapterError: No such adapter; in training; while merged; or an adapter cannot tell rows apart.
    """
    names = [name for name in dict.fromkeys(adapter_names) if name != BARE]
    for name in names:
        model._check_known(name)
    if not adapter_names:
        raise AdapterError("adapter_names is empty, expected one for each row of the batch")
    if model.training:
        raise AdapterError("a mixed batch is for inference, and the model is in training mode", "call eval() first")
    if merged_names(model):
        raise AdapterError("an adapter is merged into the base, so rows cannot have their own", "unmerge first")
    for name in names:
        if any(isinstance(layer, LoraParameter) and name in layer.r for layer in model.lora_layers()):
            raise AdapterError(
                f"{NO_ROWS}: adapter {name!r} adapts parameters of experts or an attention, which see all rows at once",
                "run one batch for each adapter",
            )
