"""The part s·B₀·A₀ of a base's weight that an adapter takes over at its start, as PiSSA, OLoRA and KaSA do.

The base's weight becomes W_res = W − s·B₀·A₀, and the adapter begins as A₀, B₀. The layer keeps both; beside W that is
little:

- where the adapter does not act (disabled, another one active), the layer adds s·B₀·A₀·x, so it answers as its base
- when the adapter is deleted or unloaded, the weight gets its part back, up to one rounding in the base's number format
- relative to the whole W, the adapter is s·(B·A − B₀·A₀): plain LoRA of rank 2r (:mod:`.conversion`)

Merged, the weight is W_res + s·B·A.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakeet.log import info
from lorakeet.lora.initialization.olora import orthonormal_pair
from lorakeet.lora.initialization.pissa import principal_pair
from lorakeet.quant.protocol import dense_weight, is_quantized, is_rounded

#: Name of the table of taken parts in a layer; it exists in layers that have some.
TABLE = "lora_taken"


class TakenPart(nn.Module):
    """A₀ [r, in], B₀ [out, r] and s; they follow the layer to other devices and are no part of a state dict.

    Attributes:
        scaling: s at the start.
        rounding: ‖W_res − W + s·B₀·A₀‖ / ‖W‖, what the base's number format loses.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)
        self.scaling, self.rounding = scaling, 0.0

    def matrix(self) -> Tensor:
        """Return s·B₀·A₀ [out, in]."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scaling


def takes_part(how: bool | str) -> bool:
    """Whether an initialization takes a part of the base's weight."""
    return isinstance(how, str) and (how == "olora" or how.startswith("pissa"))


def taken_parts(layer: Any) -> dict[str, TakenPart]:
    """Return the parts that adapters hold of a layer's weight, by adapter."""
    table = layer._modules.get(TABLE)
    return dict(table.items()) if table is not None else {}


def holds_parts(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter holds a part of the base's weights."""
    return any(adapter in taken_parts(module) for module in model.modules())


@torch.no_grad()
def take_part(layer: Any, adapter: str, how: str) -> None:
    """Initialize A and B from the base's weight, and take their product out of it.

    Args:
        layer: A LoRA layer on a linear layer, plain or quantized.
        adapter: Its adapter, which has A and B already.
        how: ``olora``, ``pissa`` or ``pissa_niter_N``.
    """
    a, b = (part.weight for part in layer.pair(adapter))
    if a.is_meta or layer.base_layer.weight.is_meta:
        return  # planned, or loaded later: there are no values yet
    r, scaling = layer.r[adapter], layer.scaling[adapter]
    with one_thread():
        weight = out_in(layer, dense_weight(layer.base_layer, a.dtype))
        pair = orthonormal_pair(weight, r) if how == "olora" else principal_pair(weight, r, scaling, how)
        a.copy_(pair[0])
        b.copy_(pair[1])
        take_out(layer, adapter, a.detach().clone(), b.detach().clone(), scaling)


def take_out(layer: Any, adapter: str, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Take s·B₀·A₀ out of the base's weight, and let the layer keep it for where the adapter does not act.

    Args:
        layer: A LoRA layer on a linear layer, plain or quantized.
        adapter: Its adapter.
        lora_A: A₀ [r, in]
        lora_B: B₀ [out, r]
        scaling: s
    """
    part = TakenPart(lora_A, lora_B, scaling)
    weight = out_in(layer, dense_weight(layer.base_layer, lora_A.dtype))
    residual = weight - part.matrix()
    set_weight(layer, residual)
    lost = out_in(layer, dense_weight(layer.base_layer, lora_A.dtype)) - residual
    part.rounding = float(lost.norm() / weight.norm().clamp_min(1e-30))
    if TABLE not in layer._modules:
        layer.add_module(TABLE, nn.ModuleDict())
    layer._modules[TABLE][adapter] = part


def tell_rounding(model: nn.Module, adapter: str) -> None:
    """Log what a quantized base loses by storing the rest of its weights again."""
    layers: list[Any] = [layer for layer in model.modules() if adapter in taken_parts(layer)]
    if lost := [taken_parts(layer)[adapter].rounding for layer in layers if is_rounded(layer.base_layer)]:
        info(
            f"the weights of {len(lost)} quantized layers are rounded again without the part that adapter {adapter!r} took: "
            f"they move by up to {max(lost):.2%} of their norm"
        )


@torch.no_grad()
def give_back(layer: Any, adapters: Collection[str] | None = None) -> None:
    """Put the parts of adapters back into the base's weight; left out: those of all that are not merged."""
    parts = taken_parts(layer)
    names = [name for name in parts if name not in layer.merged_adapters] if adapters is None else adapters
    for name in names:
        if name not in parts:
            continue
        with one_thread():
            set_weight(
                layer, out_in(layer, dense_weight(layer.base_layer, parts[name].lora_A.dtype)) + parts[name].matrix()
            )
        del layer._modules[TABLE][name]
    if TABLE in layer._modules and not layer._modules[TABLE]:
        del layer._modules[TABLE]


def whole_weight(layer: Any) -> Tensor:
    """Return the weight with all taken parts in it, in the layout of the base and in the dtype of the parts."""
    parts = list(taken_parts(layer).values())
    weight = dense_weight(layer.base_layer, parts[0].lora_A.dtype if parts else None)
    for part in parts:
        weight = weight + (part.matrix().T if layer.fan_in_fan_out else part.matrix())
    return weight


def add_idle_parts(layer: Any, acting: Collection[str], x: Tensor, h: Tensor) -> Tensor:
    """Add to the base's output what the adapters that do not act hold of it.

    Args:
        layer: A LoRA layer.
        acting: Adapters that act, or are merged.
        x: [..., in]
        h: The output of the base layer, [..., out].
    """
    for name, part in taken_parts(layer).items():
        if name not in acting:
            h = (h + part(x)).to(h.dtype)
    return h


def leave_part(layer: Any, adapter: str, x: Tensor, h: Tensor) -> Tensor:
    """Subtract from the base's whole output what an adapter that acts holds of it.

    Args:
        layer: A LoRA layer.
        adapter: The adapter.
        x: [..., in]
        h: The output of the whole weight, [..., out].
    """
    part = taken_parts(layer).get(adapter)
    return h if part is None else (h - part(x)).to(h.dtype)


def set_weight(layer: Any, weight: Tensor) -> None:
    """Give the base layer another weight [out, in], in its own number format and layout, as a new parameter.

    A weight that is tied to another module's leaves that module alone, and a change that fails can be taken back.
    """
    base = layer.base_layer
    if is_quantized(base):
        tensors = base.quantized_weight().requantize(weight.contiguous()).tensors()
    else:
        tensors = {"weight": weight.T if layer.fan_in_fan_out else weight}
    for name, tensor in tensors.items():
        old = getattr(base, name)
        new = tensor if is_quantized(base) else tensor.to(old.dtype).contiguous()
        setattr(base, name, nn.Parameter(new, requires_grad=old.requires_grad))


def out_in(layer: Any, weight: Tensor) -> Tensor:
    """Return a base layer's weight as [out, in]."""
    return weight.T if layer.fan_in_fan_out else weight


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the bits of a decomposition would depend on their number, and a resumed run needs the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
