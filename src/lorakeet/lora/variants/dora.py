"""DoRA: the update of a weight's direction, and its magnitude apart (Liu et al. 2024, arXiv:2402.09353, equation 5).

    W' = m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖        m [out], the norm of each output channel, trained; m = ‖W₀ + s·B·A‖ at first

    h  = c∘(W₀x + s·B·A·x) + b,   c = m / ‖W₀ + s·B·A‖

The norm gets no gradient (section 4.3). Dropout in training acts on all but the base's own output, as in the authors' code:

    h  = W₀x + b + (c - 1)∘W₀·dropout(x) + c∘s·B·A·dropout(x)

Several active adapters apply in their order, each to the result of those before, with the norm of W₀ and its own update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lorakeet.lora.variants.magnitude import Magnitude
from lorakeet.lora.variants.variant import AdaptedLayer, Variant

MAGNITUDE = "lora_magnitude_vector"


class Dora(Variant):
    """The method of Liu et al. 2024 (arXiv:2402.09353)."""

    name = "DoRA"
    settings: ClassVar[Mapping[str, Any]] = {"use_dora": False}
    parameters = (MAGNITUDE,)
    additive = False
    fused = True
    refused_by: ClassVar[Mapping[str, str]] = {"vLLM": "use_dora is refused"}

    def settings_error(self, settings: Mapping[str, Any]) -> str | None:
        return (
            "lora_bias=True is not supported with use_dora=True, expected one of them"
            if settings.get("lora_bias")
            else None
        )

    def unsupported(self, target: nn.Module | nn.Parameter) -> str | None:
        if isinstance(target, nn.MultiheadAttention):
            return "is a MultiheadAttention, which DoRA cannot adapt"
        return super().unsupported(target)

    def init(self, layer: AdaptedLayer, adapter: str, settings: Any) -> None:
        super().init(layer, adapter, settings)
        layer.add_part(MAGNITUDE, adapter, Magnitude(layer, adapter))

    def output_scale(self, layer: AdaptedLayer, adapter: str) -> Tensor:
        magnitude: Magnitude = layer.part(MAGNITUDE, adapter)
        return magnitude.weight.flatten() / magnitude.norms(layer, adapter).to(magnitude.weight.dtype)

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        dropped = layer.dropped(adapter, x)
        base = layer.without_bias(h if dropped is x else layer.base_layer(dropped.to(x.dtype)))
        c = layer.for_outputs(self.output_scale(layer, adapter))
        return (h + (c - 1) * base + c * layer.low_rank(adapter, dropped)).to(h.dtype)

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        return layer.for_weight(self.output_scale(layer, adapter)) * (weight + layer.delta(adapter))

    def tensor_names(self, adapter: str) -> dict[str, str]:
        return {MAGNITUDE: f"{MAGNITUDE}.{adapter}.weight"}
