"""VeRA: two vectors for each layer, between random matrices that all layers share (Kopiczko et al. 2023, arXiv:2310.11454).

    h = W₀x + Λ_b·B·Λ_d·A·x                       (equation 2)        A [r, in], B [out, r]: frozen; d [r], b [out]: trained

A and B are drawn once for the largest layer, Kaiming-uniform from a seed. Each layer uses their first columns and rows. b is
zero at first, and d a constant. There is no α.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet.config import LoraSettings
from lorakeet.lora.variants.variant import AdaptedLayer, Variant
from lorakeet.quant.protocol import weight_shape

VECTOR_B, VECTOR_D = "lora_lambda_b", "lora_lambda_d"
#: Settings of LoRA that VeRA has not, and that must be as they are left out.
_WITHOUT = ("lora_alpha", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")


class Projections(nn.Module):
    """The random matrices A and B of an adapter, one module for all layers."""

    A: Tensor
    B: Tensor

    def __init__(self, r: int, in_features: int, out_features: int, seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (r, in_features)), ("B", (out_features, r))):
            bound = math.sqrt(6 / shape[1])  # Kaiming-uniform, with the gain of a ReLU
            meta = device.type == "meta"
            drawn = torch.empty(shape, device=device) if meta else torch.empty(shape)
            self.register_buffer(name, drawn if meta else drawn.uniform_(-bound, bound, generator=generator).to(device))


class SharedMatrix(nn.Module):
    """The part of a shared A or B that one layer uses, as a linear layer without parameters of its own."""

    def __init__(self, shared: Projections, name: str, features: int) -> None:
        super().__init__()
        self.shared, self.name, self.features = shared, name, features
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """A [r, in] or B [out, r]."""
        return self.shared.A[:, : self.features] if self.name == "A" else self.shared.B[: self.features]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x [..., in] -> [..., out]."""
        return F.linear(x, self.weight)


class Vera(Variant):
    """The method of Kopiczko et al. 2023 (``vera_config``)."""

    name = "VeRA"
    settings: ClassVar[Mapping[str, Any]] = {"vera_config": None}
    parameters = (VECTOR_B, VECTOR_D)
    stores_pair = False
    refused_by: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("vLLM", "llama.cpp", "Ollama"), "its vectors and shared matrices are unknown there"
    )

    def settings_error(self, settings: Mapping[str, Any]) -> str | None:
        how = settings.get("init_lora_weights", True)
        if isinstance(how, str):
            return f"vera_config with init_lora_weights={how!r}, expected true or false"
        for key in _WITHOUT:
            if settings.get(key, (value := _default(key))) != value:
                return f"vera_config with {key}={settings[key]!r}, expected it left out: VeRA has no such setting"
        return None

    def scaling(self, settings: Any, r: int, alpha: float) -> float:
        return 1.0

    def unsupported(self, target: nn.Module | nn.Parameter) -> str | None:
        return super().unsupported(target) or self.not_linear(target)

    def shared(self, settings: Any, bases: Iterable[nn.Module]) -> Projections:
        sizes, device = [], torch.device("cpu")
        for base in bases:
            sizes.append(_in_out(base))
            device = base.weight.device  # type: ignore[assignment, union-attr]
        width, height = (max(size) for size in zip(*sizes, strict=True))
        return Projections(settings.r, width, height, settings.vera_config.projection_prng_key, device)

    def init(self, layer: AdaptedLayer, adapter: str, settings: Any) -> None:
        shared: Projections = layer.notes[adapter]
        width, height = _in_out(layer.base_layer)
        a, b = SharedMatrix(shared, "A", width), SharedMatrix(shared, "B", height)
        layer.set_pair(adapter, a, b)
        vectors = (shared.B.new_zeros(height), shared.A.new_full((settings.r,), settings.vera_config.d_initial))
        if not settings.init_lora_weights:
            vectors = (torch.ones_like(vectors[0]), torch.randn_like(vectors[1]))
        for name, vector in zip((VECTOR_B, VECTOR_D), vectors, strict=True):
            layer.add_part(name, adapter, nn.Parameter(vector))

    def factors(self, layer: AdaptedLayer, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return layer.part(VECTOR_D, adapter)[:, None] * a, layer.part(VECTOR_B, adapter)[:, None] * b

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        a, b = layer.pair(adapter)
        columns = a(layer.dropped(adapter, x).to(a.weight.dtype)) * layer.part(VECTOR_D, adapter)
        low_rank = b(columns) * layer.part(VECTOR_B, adapter) * layer.scaling[adapter]
        return (h + low_rank).to(h.dtype)

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        return weight + layer.delta(adapter)

    def shared_names(self, adapter: str, settings: Any) -> dict[str, str]:
        if not settings.vera_config.save_projection:
            return {}
        return {f"vera_{name}": f"lora_{name}.{adapter}.shared.{name}" for name in "AB"}


def _default(key: str) -> Any:
    return LoraSettings.model_fields[key].get_default(call_default_factory=True)


def _in_out(base: Any) -> tuple[int, int]:
    """Return the input and output features of a linear layer."""
    rows, columns = weight_shape(base)
    return (rows, columns) if isinstance(base, Conv1D) else (columns, rows)
