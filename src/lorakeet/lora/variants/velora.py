"""VeLoRA: the inputs that A's gradient needs are kept compressed (Miles et al. 2024, arXiv:2405.17991).

    h  = W₀x + s·B·A·x                              as plain LoRA
    ∂A = (s·g·B)ᵀ·x̂,   x̂ = scale·(x_g·v)·vᵀ          x_g: groups of x, v: one unit vector [in / groups]

One number is kept for each group of features in place of the group. v is the mean group of the batch (``batch_average``), of
the first batch (``batch_average_once``), or random. B's gradient is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakeet.errors import ConfigError
from lorakeet.lora.variants.variant import AdaptedLayer, Variant

PROJECTION = "lora_velora_embed"
_INIT_TYPES = ("batch_average", "batch_average_once", "random")


@dataclass
class VeloraConfig:
    """Settings of VeLoRA, with PEFT's names.

    Attributes:
        num_groups: Groups of features; more groups cost more memory and make the gradient more exact.
        scale: Factor of the restored inputs.
        init_type: Origin of v: ``batch_average``, ``batch_average_once`` or ``random``.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        if self.num_groups <= 0:
            raise ConfigError(
                f"velora_config: `num_groups` should be positive, got {self.num_groups}, expected more than 0"
            )
        if self.scale <= 0:
            raise ConfigError(f"velora_config: `scale` should be positive, got {self.scale}, expected more than 0")
        if self.init_type not in _INIT_TYPES:
            raise ConfigError(
                f"velora_config has init_type={self.init_type!r}, expected one of {', '.join(_INIT_TYPES)}"
            )


class _CompressedInput(torch.autograd.Function):
    """x [..., in], A [r, in], v [in / groups] -> x·Aᵀ; of x its products with v are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(_grouped(x, groups) @ v.to(x.dtype), lora_A, v)
        ctx.shape, ctx.scale = x.shape, scale
        return F.linear(x, lora_A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, lora_A, v = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = (g @ lora_A.to(g.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        dA = None
        if ctx.needs_input_grad[1]:
            restored = (kept[..., None] * v).flatten(1)[:, : ctx.shape[-1]] * ctx.scale
            dA = (g.T @ restored.to(g.dtype)).to(lora_A.dtype)
        return dx, dA, None, None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return x [..., in] as [tokens, groups, in / groups], padded with zeros."""
    width = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * width - x.shape[-1])).reshape(-1, groups, width)


def _unit(v: Tensor) -> Tensor:
    """Return v as a unit vector in fp32; of zeros, one with equal entries."""
    v = v.float()
    v = v if v.any() else torch.ones_like(v)
    return v / v.norm()


class Velora(Variant):
    """LoRA with compressed inputs (``velora_config``). The adapter is plain LoRA, with v beside it."""

    name = "VeLoRA"
    settings: ClassVar[Mapping[str, Any]] = {"velora_config": None}
    types: ClassVar[Mapping[str, type]] = {"velora_config": VeloraConfig}
    buffers = (PROJECTION,)
    refused_by: ClassVar[Mapping[str, str]] = {"vLLM": "the tensors of VeLoRA are refused"}

    def unsupported(self, target: nn.Module | nn.Parameter) -> str | None:
        return super().unsupported(target) or self.not_linear(target)

    def init(self, layer: AdaptedLayer, adapter: str, settings: Any) -> None:
        super().init(layer, adapter, settings)
        chosen: VeloraConfig = settings.velora_config
        a = layer.matrices(adapter)[0]
        width = -(-a.shape[1] // chosen.num_groups)
        random = chosen.init_type == "random"
        v = _unit(torch.randn(width, device=a.device)) if random else torch.zeros(width, device=a.device)
        layer.add_buffer(PROJECTION, adapter, v.to(a.dtype))
        layer.notes[adapter] = chosen

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        dropped = layer.dropped(adapter, x)
        if not (layer.training and torch.is_grad_enabled()):
            return (h + layer.low_rank(adapter, dropped)).to(h.dtype)
        chosen: VeloraConfig = layer.notes[adapter]
        a, b = layer.pair(adapter)
        dropped = dropped.to(a.weight.dtype)
        v = layer.part(PROJECTION, adapter)
        if chosen.init_type == "batch_average" or (chosen.init_type == "batch_average_once" and not v.any()):
            mean = _grouped(dropped.detach(), chosen.num_groups).flatten(0, 1).mean(0)
            v = _unit(mean).to(v.dtype)
            layer.add_buffer(PROJECTION, adapter, v)
        u = _CompressedInput.apply(dropped, a.weight, v, chosen.num_groups, chosen.scale)
        return (h + b(u) * layer.scaling[adapter]).to(h.dtype)

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        return weight + layer.delta(adapter)
