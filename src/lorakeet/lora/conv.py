"""LoRA on a convolution: h = W₀∗x + s·B∗(A∗dropout(x)).

A convolves as the base does (kernel, stride, padding and its mode, dilation), into r channels. B is a convolution of kernel 1
from r to the base's channels. Both are linear in x, so together they are one convolution with

    ΔW[o, i, k] = s·Σ_ρ B[o, ρ]·A[ρ, i, k]          (a matrix product with the kernel flattened into i)

With ``groups = g > 1`` the tensors have PEFT's shapes. A sees all input channels, and each group of outputs has r/g of the
ranks to itself: B [out, r/g]. That update mixes channels which the grouped base weight [out, in/g, kernel] keeps apart.
So merging is refused; forward and training are unaffected.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakeet.errors import MergeError
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer import noise
from lorakeet.lora.linear import LoraPair

_CLASSES = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by the number of the weight's dimensions


class LoraConv(LoraPair):
    """LoRA on a convolution (weight [out, in / groups, *kernel]); a subclass for each number of dimensions."""

    @classmethod
    def rank_error(cls, base_layer: nn.Module, r: int) -> str | None:
        groups: Any = base_layer.groups
        return f"has {groups} groups, and rank {r} is not a multiple of {groups}" if r % groups else None

    def make(self, adapter: str, config: PeftConfig, r: int) -> None:
        base = self.base_layer
        conv: Any = _CLASSES[base.weight.ndim]
        like_base = {
            key: getattr(base, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        like_base |= self._device_dtype()
        a = nn.utils.skip_init(conv, base.in_channels, r, bias=False, **like_base)
        pointwise = {"kernel_size": 1, "groups": base.groups, "bias": config.lora_bias, **self._device_dtype()}
        b = nn.utils.skip_init(conv, r, base.out_channels, **pointwise)
        self.set_pair(adapter, a, b)

    def delta(self, adapter: str) -> Tensor:
        if error := self.merge_error():
            raise MergeError(f"this layer {error}", "use the adapter unmerged")
        a, b = self.pair(adapter)
        ba = self.scaling[adapter] * (b.weight.flatten(1) @ a.weight.flatten(1))  # [out, in · kernel]
        return ba.view_as(self.base_layer.weight)

    def for_outputs(self, channels: Tensor) -> Tensor:
        return channels.view(1, -1, *[1] * (self.base_layer.weight.ndim - 2))

    def probe(self) -> Tensor:
        base = self.base_layer
        padding = (0,) * len(base.kernel_size) if isinstance(base.padding, str) else base.padding
        sizes = zip(base.kernel_size, base.dilation, padding, strict=True)
        return noise((2, base.in_channels, *(d * (k - 1) + p + 4 for k, d, p in sizes)), base)

    def merge_error(self) -> str | None:
        groups = self.base_layer.groups
        return f"has {groups} groups, and its update mixes channels across them" if groups > 1 else None


class LoraConv1d(LoraConv):
    """LoRA on ``nn.Conv1d``."""

    shown_as = "lora.Conv1d"


class LoraConv2d(LoraConv):
    """LoRA on ``nn.Conv2d``."""

    shown_as = "lora.Conv2d"


class LoraConv3d(LoraConv):
    """LoRA on ``nn.Conv3d``."""

    shown_as = "lora.Conv3d"
