"""LoRA on convolutions: h = W₀∗x + s·B∗(A∗dropout(x)).

A convolves as the base does (kernel, stride, padding and its mode, dilation) but into r channels; B is a convolution of
kernel 1 from r to the base's channels. Both are linear in x, so together they are one convolution with

    ΔW[o, i, k] = s·Σ_ρ B[o, ρ]·A[ρ, i, k]          (a matrix product with the kernel flattened beside i)

With ``groups = g > 1`` the tensors have PEFT's shapes: A sees all input channels, and each group of outputs has r/g of the
ranks to itself, B [out, r/g]. That update mixes channels which the grouped base weight [out, in/g, kernel] keeps apart,
so it answers and learns like any other, and merging is refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakeet.errors import MergeError
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer import LoraPair, noise

_CLASSES = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by the number of the weight's dimensions


class LoraConv(LoraPair):
    """LoRA on ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` (weight [out, in / groups, *kernel])."""

    def make(self, adapter: str, config: PeftConfig, r: int) -> None:
        base = self.base_layer
        kind: Any = _CLASSES[base.weight.ndim]
        place: dict[str, Any] = {"device": base.weight.device, "dtype": self._adapter_dtype()}
        alike = {key: getattr(base, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        a = nn.utils.skip_init(kind, base.in_channels, r, bias=False, **alike, **place)
        b = nn.utils.skip_init(
            kind, r, base.out_channels, kernel_size=1, groups=base.groups, bias=config.lora_bias, **place
        )
        self.put(adapter, a, b, config, r)

    def delta(self, adapter: str) -> Tensor:
        if why := self.unmergeable():
            raise MergeError(f"this layer {why}")
        a, b = self.pair(adapter)
        ba = self.scaling[adapter] * (b.weight.flatten(1) @ a.weight.flatten(1))  # [out, in · kernel]
        return ba.view_as(self.base_layer.weight)

    def probe(self) -> Tensor:
        base = self.base_layer
        padding = (0,) * len(base.kernel_size) if isinstance(base.padding, str) else base.padding
        sizes = zip(base.kernel_size, base.dilation, padding, strict=True)
        return noise((2, base.in_channels, *(d * (k - 1) + p + 4 for k, d, p in sizes)), base.weight)

    @classmethod
    def complaint(cls, base_layer: nn.Module, config: PeftConfig, r: int) -> str | None:
        groups: Any = base_layer.groups
        return f"convolves in {groups} groups, which share rank {r} unequally" if r % groups else None

    def unmergeable(self) -> str | None:
        groups = self.base_layer.groups
        return f"convolves in {groups} groups, and its update mixes channels across them" if groups > 1 else None
