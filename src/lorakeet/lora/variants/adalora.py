"""AdaLoRA: the update in the form of an SVD, whose singular values are set to zero where they matter least.

    ΔW = s·P·Λ·Q,   s = α/r₀                       (Zhang et al. 2023, arXiv:2303.10512, equation 3)
    R  = ‖PᵀP − I‖ + ‖QQᵀ − I‖                     (equation 4), of which γ times the mean is added to the loss

P is B here and Q is A. The diagonal Λ, ``lora_E`` [r, 1], begins at zero. r₀ is the rank at the start, and s does not change:
a triplet of Λᵢ, Pᵢ and Qᵢ keeps its meaning when others go. :mod:`.rank_allocator` chooses the triplets that stay.

A norm is counted for each P and Q and their mean is taken, as in the authors' code and PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakeet.config import AdaLoraConfig
from lorakeet.errors import AdapterError, ConfigError
from lorakeet.lora.variants.rank_allocator import Importance, allocate
from lorakeet.lora.variants.variant import AdaptedLayer, Variant

SINGULAR_VALUES = "lora_E"
#: Standard deviation of P and Q at the start; the authors'.
_DEVIATION = 0.02


class AdaLora(Variant):
    """The method of Zhang et al. 2023 (``adalora_config``)."""

    name = "AdaLoRA"
    settings: ClassVar[Mapping[str, Any]] = {"adalora_config": None}
    parameters = (SINGULAR_VALUES,)
    fused = True
    refused_by: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("vLLM", "llama.cpp", "Ollama"),
        "its singular values are unknown there; save_pretrained(plain_lora=True) writes it as plain LoRA",
    )

    def settings_error(self, settings: Mapping[str, Any]) -> str | None:
        chosen: AdaLoraConfig = settings["adalora_config"]
        how = settings.get("init_lora_weights", True)
        if isinstance(how, str):
            return f"adalora_config with init_lora_weights={how!r}, expected true or false"
        beside = [key for key in ("use_rslora", "lora_bias", "alpha_pattern") if settings.get(key)]
        if beside:
            return (
                f"adalora_config with {beside[0]}, expected one of them: the scale is lora_alpha / init_r in all layers"
            )
        if max(settings.get("rank_pattern", {}).values(), default=0) > chosen.init_r:
            return f"rank_pattern has a rank above adalora_config.init_r={chosen.init_r}, expected at most as many"
        return None

    def scaling(self, settings: Any, r: int, alpha: float) -> float:
        return float(alpha / settings.adalora_config.init_r)

    def unsupported(self, target: nn.Module | nn.Parameter) -> str | None:
        return super().unsupported(target) or self.not_linear(target)

    def init(self, layer: AdaptedLayer, adapter: str, settings: Any) -> None:
        a, b = layer.pair(adapter)
        values = torch.empty(len(a.weight), 1, dtype=a.weight.dtype, device=a.weight.device)
        if settings.init_lora_weights:
            nn.init.zeros_(values)
        else:
            nn.init.normal_(values)
        for weight in (a.weight, b.weight):
            nn.init.normal_(weight, std=_DEVIATION if settings.init_lora_weights else 1.0)
        layer.add_part(SINGULAR_VALUES, adapter, nn.Parameter(values))
        layer.notes[adapter] = Importance(settings.adalora_config)

    def factors(self, layer: AdaptedLayer, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a, b * layer.part(SINGULAR_VALUES, adapter).flatten()

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        a, b = layer.pair(adapter)
        columns = a(layer.dropped(adapter, x).to(a.weight.dtype)) * layer.part(SINGULAR_VALUES, adapter).flatten()
        return (h + b(columns) * layer.scaling[adapter]).to(h.dtype)

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        return weight + layer.delta(adapter)

    def saved_pair(self, leaf: str, tensors: Mapping[str, Tensor], settings: Any) -> tuple[Tensor, Tensor]:
        return tensors["A"], tensors["B"] * tensors[SINGULAR_VALUES].flatten()


def orthogonality(layers: Sequence[Any], adapter: str) -> Tensor | float:
    """Return γ times the mean of ‖BᵀB − I‖ and ‖AAᵀ − I‖ over the layers of an adapter; 0.0 of any other variant.

    Args:
        layers: LoRA layers of a model.
        adapter: The adapter's name.
    """
    norms = []
    for layer in (found := adaptive_layers(layers, adapter)):
        a, b = (part.weight.float() for part in layer.pair(adapter))
        one = torch.eye(len(a), device=a.device)
        norms += [torch.linalg.norm(a @ a.T - one), torch.linalg.norm(b.T @ b - one)]
    return found[0].notes[adapter].config.orth_reg_weight * torch.stack(norms).mean() if norms else 0.0


def adaptive_layers(layers: Iterable[Any], adapter: str) -> list[Any]:
    """Return the layers in which an adapter is of this variant."""
    return [layer for layer in layers if isinstance(layer.variants.get(adapter), AdaLora)]


def allocate_active(layers: Sequence[Any], adapters: Iterable[str], step: int) -> None:
    """Choose the ranks of those adapters that are of this variant.

    Args:
        layers: LoRA layers of a model.
        adapters: Names of adapters.
        step: Steps that are done.

    Raises:
        AdapterError: None of them is.
        ConfigError: The settings of one do not say the steps of the training.
    """
    chosen = {name: found for name in adapters if (found := adaptive_layers(layers, name))}
    if not chosen:
        raise AdapterError(
            "the model has no AdaLoRA adapter that is active", "LoraConfig(adalora_config=AdaLoraConfig())"
        )
    for name, found in chosen.items():
        if (total := found[0].notes[name].config.total_step) is None:
            raise ConfigError(
                f"adalora_config.total_step of adapter {name!r} is not set, expected the steps of the training",
                "AdaLoraConfig(total_step=...)",
            )
        allocate(found, name, step, total)
