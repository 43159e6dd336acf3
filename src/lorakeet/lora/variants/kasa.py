"""KaSA: the update in the form of an SVD, on a base without its smallest singular directions (arXiv:2412.06071).

    W' = W − Σᵢ σᵢ·uᵢ·vᵢᵀ + s·B·diag(d)·A        i: the r smallest singular values of W; d [r], trained beside A and B

The authors add β·‖d‖² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖) to the loss (equations 9 to 11): :func:`penalty`. The base gets its
directions back wherever the adapter does not act (:mod:`lorakeet.lora.initialization.taken_part`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakeet.errors import ConfigError
from lorakeet.lora.initialization.taken_part import one_thread, out_in, take_out, whole_weight
from lorakeet.lora.variants.variant import AdaptedLayer, Variant
from lorakeet.quant.protocol import is_rounded

DIAGONAL = "lora_diag"


@dataclass
class KasaConfig:
    """Settings of KaSA, with PEFT's names.

    Attributes:
        beta: Factor β of the penalty on d.
        gamma: Factor γ of the penalty on A and B that are not orthonormal.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"kasa_config: `{name}` must be non-negative, got {value}, expected 0 or more")


class Kasa(Variant):
    """The method of Wang et al. 2024 (``kasa_config``)."""

    name = "KaSA"
    settings: ClassVar[Mapping[str, Any]] = {"kasa_config": None}
    types: ClassVar[Mapping[str, type]] = {"kasa_config": KasaConfig}
    parameters = (DIAGONAL,)
    additive = False
    takes_part = True
    refused_by: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("vLLM", "llama.cpp", "Ollama"), "it acts on another base, and its diagonal is unknown there"
    )

    def settings_error(self, settings: Mapping[str, Any]) -> str | None:
        how = settings.get("init_lora_weights", True)
        return f"kasa_config with init_lora_weights={how!r}, expected true or false" if isinstance(how, str) else None

    def unsupported(self, target: nn.Module | nn.Parameter) -> str | None:
        if isinstance(target, nn.Module) and is_rounded(target):
            return "is quantized, and KaSA takes less out of a weight than its rounding"
        return super().unsupported(target) or self.not_linear(target)

    def init(self, layer: AdaptedLayer, adapter: str, settings: Any) -> None:
        super().init(layer, adapter, settings)
        a, _ = layer.pair(adapter)
        r, like = len(a.weight), {"dtype": a.weight.dtype, "device": a.weight.device}
        layer.add_part(DIAGONAL, adapter, nn.Parameter(torch.randn(r, **like)))
        layer.notes[adapter] = settings.kasa_config
        take_smallest(layer, adapter, r)

    def factors(self, layer: AdaptedLayer, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a, b * layer.part(DIAGONAL, adapter)

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        a, b = layer.pair(adapter)
        columns = a(layer.dropped(adapter, x).to(a.weight.dtype)) * layer.part(DIAGONAL, adapter)
        return (h + b(columns) * layer.scaling[adapter]).to(h.dtype)

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        return weight + layer.delta(adapter)

    def saved_pair(self, leaf: str, tensors: Mapping[str, Tensor], settings: Any) -> tuple[Tensor, Tensor]:
        return tensors["A"], tensors["B"] * tensors[DIAGONAL]


@torch.no_grad()
def take_smallest(layer: Any, adapter: str, r: int) -> None:
    """Take the r smallest singular directions of the whole weight out of a layer's base.

    Raises:
        ConfigError: Nothing of the weight would be left.
    """
    weight = out_in(layer, whole_weight(layer))
    if r >= min(weight.shape):
        raise ConfigError(
            f"KaSA requires `r` below the smaller side of each layer: r is {r}, and a weight is {list(weight.shape)}",
            "choose a smaller rank, or leave the layer out",
        )
    if weight.is_meta:
        return
    with one_thread():
        u, sigma, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    take_out(layer, adapter, vh[-r:].contiguous(), u[:, -r:] * sigma[-r:], 1.0)


def penalty(layers: Iterable[Any], adapters: Iterable[str]) -> Tensor | float:
    """Return β·‖d‖² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖), summed over the layers with one of the adapters; 0.0 without any."""
    total: Tensor | float = 0.0
    for layer, adapter in ((layer, adapter) for adapter in adapters for layer in layers):
        if not isinstance(layer.variants.get(adapter), Kasa):
            continue
        chosen: KasaConfig = layer.notes[adapter]
        a, b = (part.weight.float() for part in layer.pair(adapter))
        one = torch.eye(len(a), device=a.device)
        apart = torch.linalg.norm(b.T @ b - one) + torch.linalg.norm(a @ a.T - one)
        total = total + chosen.beta * layer.part(DIAGONAL, adapter).float().square().sum() + chosen.gamma * apart
    return total
