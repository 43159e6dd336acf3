"""Plain LoRA: h = W₀x + s·B·A·x and W' = W₀ + s·B·A, with s = α/r or, as rsLoRA, α/√r."""

from __future__ import annotations

from torch import Tensor, nn

from lorakeet.lora.variants.variant import AdaptedLayer, Variant


class Lora(Variant):
    """The method of Hu et al. 2021 (arXiv:2106.09685)."""

    name = "LoRA"
    fused = True

    def unsupported(self, target: nn.Module | nn.Parameter) -> str | None:
        return None

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        return (h + layer.low_rank(adapter, layer.dropped(adapter, x))).to(h.dtype)

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        return weight + layer.delta(adapter)
