"""Adapters in the layout of the compiled loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakeet.kernels.decoder_step import Update
from lorakeet.kernels.paged import UpdateTable
from lorakeet.lora.initialization.taken_part import taken_parts
from lorakeet.lora.linear import LoraLinear
from lorakeet.serve.compiled.layers import LINEARS
from lorakeet.serve.engine.residents import MakeUpdate


def made_table(count: int, layers: Sequence[str], update: MakeUpdate) -> UpdateTable | None:
    """Return an adapter, which no model has, in the layout of the compiled loops.

    Args:
        count: Number of decoder layers.
        layers: Names of the layers with an update.
        update: Function that returns the update of each.

    Returns:
        The table; None for an adapter that the loops cannot compute.
    """
    names = [[f"model.layers.{number}.{name}" for name in LINEARS] for number in range(count)]
    if not {name for layer in names for name in layer}.issuperset(layers):
        return None
    made = {name: update(name) for name in layers}
    if any(one is None for one in made.values()):
        return None
    return UpdateTable([[made.get(name) for name in layer] for layer in names])


def read_updates(model: Any, adapter: str) -> UpdateTable | None:
    """Copy an adapter of a model into the layout of the compiled loops.

    Args:
        model: The model with the adapter; a causal one of the Llama family.
        adapter: Its name in the model.

    Returns:
        The copy; None for an adapter that does more than LoRA and DoRA on the decoder's linear layers do.
    """
    layers = [[layer.get_submodule(name) for name in LINEARS] for layer in model.model.layers]
    known = {id(module) for layer in layers for module in layer}
    adapted = [part for part in model.lora_parts() if adapter in part.adapters]
    if model.peft_config[adapter].bias != "none" or any(id(part) not in known for part in adapted):
        return None
    updates: list[list[Update | None]] = []
    for layer in layers:
        updates.append([])
        for module in layer:
            if not isinstance(module, LoraLinear) or adapter not in module.adapters:
                updates[-1].append(None)
                continue
            update = module.decoder_update(adapter)
            if update is None or adapter in taken_parts(module):
                return None
            updates[-1].append(update)
    return UpdateTable(updates)
