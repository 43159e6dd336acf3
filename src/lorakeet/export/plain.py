"""An adapter as plain LoRA with s = 1: the form that every tool reads alike.

Scales (``lora_alpha``, ``use_rslora``, ``alpha_pattern``) are multiplied into B. A variant that is no sum W + s·B·A becomes
plain LoRA by a singular value decomposition of its merged weight minus the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorakeet.adapter.inspect import saved_layers
from lorakeet.adapter.tensor_checks import is_untrained, nonfinite_error
from lorakeet.config import BaseSettings
from lorakeet.errors import AdapterError
from lorakeet.loaded_model import open_model
from lorakeet.lora.algebra.approximation import nearest
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.taken_part import taken_parts
from lorakeet.lora.linear import LoraLinear
from lorakeet.quant.protocol import dense_weight


@dataclass(frozen=True)
class PlainLayer:
    """The update ΔW = B·A of one layer.

    Attributes:
        name: The layer's name in the base.
        A: [r, in]; of an embedding [r, vocabulary].
        B: [out, r]; of an embedding [dim, r].
        embedding: Whether the layer is an embedding.
        lost: Share of ‖ΔW‖ that B·A does not have.
    """

    name: str
    A: Tensor
    B: Tensor
    embedding: bool = False
    lost: float = 0.0

    @property
    def rank(self) -> int:
        """The rank of the layer."""
        return len(self.A)

    @property
    def kind(self) -> str:
        """The last part of the layer's name."""
        return self.name.rpartition(".")[2]

    def padded(self, rank: int) -> PlainLayer:
        """Return the layer with zeros in A and B up to this rank: the same ΔW."""
        more = rank - self.rank
        pad = torch.nn.functional.pad
        return replace(self, A=pad(self.A, (0, 0, 0, more)), B=pad(self.B, (0, more)))


def plain_layers(name: str, config: PeftConfig, tensors: Mapping[str, Tensor]) -> list[PlainLayer]:
    """Return the layers of an adapter of plain LoRA, in fp32, their scales multiplied into B.

    Args:
        name: What the user called the adapter.
        config: Its settings.
        tensors: The tensors of its file.

    Raises:
        AdapterError: It is damaged, untrained, or adapts layers that are no matrices.
    """
    layers, _ = saved_layers(tensors, config)
    problem = next((error for layer in layers if (error := layer.error())), nonfinite_error(tensors))
    if problem or not layers or is_untrained(tensors):
        raise AdapterError(
            f"adapter {name!r} cannot be exported: {problem or 'it is untrained'}", "train or save it again"
        )
    made = []
    for layer in layers:
        a, b = layer.tensors["A"].float(), layer.tensors["B"].double() * layer.scaling
        if a.ndim != 2:
            raise AdapterError(f"{layer.name} is a convolution, expected a linear layer or an embedding", MERGE_HINT)
        embedding = any(key.endswith(f"{layer.name}.lora_embedding_A") for key in tensors)
        made.append(PlainLayer(layer.name.replace(".base_layer", ""), a, b.float(), embedding))
    return made


#: Hint for an adapter that cannot be handed on as one.
MERGE_HINT = "export the merged model: --for merged"


def layers_by_svd(
    settings: BaseSettings, adapter: str, rank: int | None = None, *, allow_other_base: bool = False
) -> list[PlainLayer]:
    """Return plain layers of an adapter of any variant: the nearest matrices of this rank to the change of each weight.

    Args:
        settings: Settings of the base.
        adapter: Folder or hub id.
        rank: The rank of every layer; None: that of the adapter, twice that where it took a part of the base's weight.
        allow_other_base: Accept an adapter that was trained on another base.

    Raises:
        AdapterError: It adapts a layer that is not linear.
    """
    whole = settings.model_copy(update={"dtype": "fp32"})
    opened = open_model(whole, [adapter], allow_other_base=allow_other_base)
    own = opened.adapters[adapter]
    made = []
    for name, layer in _adapted(opened.model, own):
        change, taken = _change(layer, own)
        wanted = rank or layer.r[own] * (2 if taken else 1)
        a, b = (part.float() for part in nearest(change, wanted).truncated(wanted))
        lost = float((change.double() - b.double() @ a.double()).norm() / change.double().norm().clamp(min=1e-30))
        made.append(PlainLayer(name, a, b, lost=lost))
    return made


@torch.no_grad()
def _change(layer: LoraLinear, adapter: str) -> tuple[Tensor, bool]:
    """Return what an adapter changes in the whole weight of a layer, [out, in], and whether it took a part of it."""
    change = layer.merged_weight([adapter]) - dense_weight(layer.base_layer, torch.float32)
    change = change.T if layer.fan_in_fan_out else change
    taken = taken_parts(layer).get(adapter)
    return (change, False) if taken is None else (change - taken.matrix(), True)


def _adapted(model: Any, adapter: str) -> Sequence[tuple[str, LoraLinear]]:
    """Return the names and layers that an adapter has a part in."""
    parts = {id(part): part for part in model.lora_parts()}
    found = [(name, module) for name, module in model.named_modules() if id(module) in parts]
    if wrong := [name for name, module in found if not isinstance(module, LoraLinear)]:
        raise AdapterError(f"{wrong[0]} is no linear layer, which a decomposition needs", MERGE_HINT)
    return [(name, module) for name, module in found if adapter in module.r]
