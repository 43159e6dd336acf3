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

    def part(self, name: str, adapter: str) -> Any:
        """Return a part that :meth:`add_part` gave the adapter."""
        return self._table(name)[adapter]

    def variant_parts(self, adapter: str) -> list[Tensor]:
        """Return the parameters that the adapter's variant added."""
        found = [self.part(name, adapter) for name in self.variants[adapter].parameters]
        return [p for part in found for p in ([part] if isinstance(part, Tensor) else part.parameters())]

    def _table(self, name: str) -> Any:
        return self._modules[name]
