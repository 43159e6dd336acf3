"""Layer that variants act on: the parts that they add to it, and its output channels in the shapes that they need."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakeet.lora.variants.variant import Variant
from lorakeet.quant.protocol import weight_shape


class VariantHost(nn.Module):
    """Parts of variants, as a parent class of :class:`~lorakeet.lora.layer.LoraLayer`."""

    base_layer: Any
    variants: dict[str, Variant]
    notes: dict[str, Any]

    #: Last part of the layer's name in the model.
    leaf = ""
    #: Dimension of the base layer's weight that counts output channels.
    channel_dim = 0

    def for_outputs(self, channels: Tensor) -> Tensor:
        """Return a vector [out] in a shape that broadcasts with outputs."""
        return channels

    def for_weight(self, channels: Tensor) -> Tensor:
        """Return a vector [out] in a shape that broadcasts with the base layer's weight."""
        return channels.view(
            [-1 if dim == self.channel_dim else 1 for dim in range(len(weight_shape(self.base_layer)))]
        )

    def without_bias(self, h: Tensor) -> Tensor:
        """Return an output of the layer without the base layer's bias."""
        bias = getattr(self.base_layer, "bias", None)
        return h if bias is None else h - self.for_outputs(bias)

    def add_part(self, name: str, adapter: str, part: nn.Parameter | nn.Module) -> None:
        """Give the adapter a further part; ``name`` is one of its variant's ``parameters``."""
        if name not in self._modules:
            self.add_module(name, nn.ParameterDict() if isinstance(part, nn.Parameter) else nn.ModuleDict())
        self._table(name)[adapter] = part

    def add_buffer(self, name: str, adapter: str, value: Tensor) -> None:
        """Give the adapter a tensor that is saved and not trained, or another value of it."""
        if name not in self._modules:
            self.add_module(name, nn.Module())
        self._table(name).register_buffer(adapter, value)

    def part(self, name: str, adapter: str) -> Any:
        """Return what :meth:`add_part` or :meth:`add_buffer` gave the adapter."""
        table = self._table(name)
        return table._buffers[adapter] if adapter in table._buffers else table[adapter]

    def delete_parts(self, adapter: str) -> None:
        """Remove what the adapter's variant added."""
        if adapter in self.variants:
            for name in self.variants[adapter].parameters:
                del self._table(name)[adapter]
            for name in self.variants[adapter].buffers:
                del self._table(name)._buffers[adapter]
        self.notes.pop(adapter, None)

    def variant_parts(self, adapter: str) -> list[Tensor]:
        """Return the parameters that the adapter's variant added."""
        found = [self.part(name, adapter) for name in self.variants[adapter].parameters]
        return [p for part in found for p in ([part] if isinstance(part, Tensor) else part.parameters())]

    def _table(self, name: str) -> Any:
        return self._modules[name]
