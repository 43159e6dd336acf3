"""LoRA on a bare ``nn.Parameter`` (``target_parameters``), above all on the stacked weights of experts.

    W'[e] = W[e] + s·B[e]·A[e]          W [experts, out, in] or [experts, in, out], or plainly [out, in]

A and B of all experts are stored side by side, as in PEFT: A [r·experts, in], B [out, r·experts].

Nothing is wrapped, and ΔW is not formed. While the module that owns the parameter runs, the parameter's name leads to a
:class:`~lorakeet.kernels.low_rank_weight.LowRankWeight`. With it, transformers' expert implementations (the eager loop, the
grouped and the batched product) run unchanged. No tensor of an expert's size is made, stored for backward, or given a
gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.kernels.low_rank_weight import LowRankWeight
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer import ActiveAdapters, noise
from lorakeet.lora.linear import LoraLinear, LoraPair
from lorakeet.lora.targeting import Target


@dataclass(eq=False)
class Slot:
    """A parameter of a module, as a layer that has nothing but a weight.

    Attributes:
        module: The module that owns the parameter.
        name: The parameter's name in it.
    """

    module: nn.Module
    name: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, also while its name leads to a :class:`LowRankWeight`."""
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        return parameter

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self.module._parameters[self.name] = value


class LoraParameters(nn.ModuleDict):
    """The :class:`LoraParameter` of each adapted parameter of a module, by the parameter's name; its ``lora_parameters``."""


class LoraParameter(LoraPair):
    """LoRA on one parameter of a module; the parameter stays where it is, and the module gets this as a child.

    Attributes:
        experts: Number of stacked weights; 1 for a matrix.
        transposed: Whether they are stored as [experts, in, out].
    """

    shown_as = "lora.ParamWrapper"

    def __init__(self, base_layer: Slot, switch: ActiveAdapters) -> None:
        super().__init__(base_layer, switch)
        module, weight = base_layer.module, base_layer.weight
        self.experts = weight.shape[0] if weight.ndim == 3 else 1
        self.transposed = weight.ndim == 3 and bool(getattr(module, "is_transposed", False))
        self.hooks = (
            module.register_forward_pre_hook(self._show),
            module.register_forward_hook(self._hide, always_call=True),
        )

    @classmethod
    def on(cls, module: nn.Module, name: str, switch: ActiveAdapters) -> LoraParameter:
        """Return the LoRA layer of the parameter ``name`` of ``module``; it is made if there is none yet."""
        table = module._modules.get("lora_parameters")
        if table is None:
            table = LoraParameters()
            module.add_module("lora_parameters", table)
        assert isinstance(table, LoraParameters)
        if name not in table:
            kind = LoraInProjection if isinstance(module, nn.MultiheadAttention) else cls
            table[name] = kind(Slot(module, name), switch)
        layer = table[name]
        assert isinstance(layer, LoraParameter)
        return layer

    def release(self) -> None:
        """Remove the layer from its module."""
        for hook in self.hooks:
            hook.remove()
        module, table = self.base_layer.module, self.base_layer.module.lora_parameters
        del table[self.base_layer.name]
        if not table:
            del module.lora_parameters

    @property
    def in_features(self) -> int:
        """Number of features that the parameter, or each expert, multiplies."""
        return int(self.base_layer.weight.shape[-2 if self.transposed else -1])

    @property
    def out_features(self) -> int:
        """Number of features of the product."""
        return int(self.base_layer.weight.shape[-1 if self.transposed else -2])

    def make(self, adapter: str, config: PeftConfig, r: int) -> None:
        a = nn.utils.skip_init(nn.Linear, self.in_features, r * self.experts, bias=False, **self._device_dtype())
        b = nn.utils.skip_init(nn.Linear, r * self.experts, self.out_features, bias=False, **self._device_dtype())
        self.set_pair(adapter, a, b)

    def low_rank_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return L [..., m, r] and R [..., r, n] with ΔW = L·R in the parameter's layout; s is a factor of one of them."""
        (a, b), r = self.pair(adapter), self.r[adapter]
        lora_A = a.weight.reshape(self.experts, r, -1)  # [experts, r, in]: rows e·r to (e + 1)·r belong to expert e
        lora_B = b.weight.reshape(-1, r, self.experts).permute(2, 0, 1)  # [experts, out, r]: columns ρ·experts + e
        lora_B = lora_B.contiguous() * self.scaling[adapter]
        if self.base_layer.weight.ndim == 2:
            lora_A, lora_B = lora_A[0], lora_B[0]
        return (lora_A.mT, lora_B.mT) if self.transposed else (lora_B, lora_A)

    def low_rank_sum(self, adapters: list[str]) -> LowRankWeight:
        """Return W + Σ ΔW, several adapters as one of their summed rank."""
        lefts, rights = zip(*map(self.low_rank_factors, adapters), strict=True)
        if len(adapters) == 1:
            return LowRankWeight(self.base_layer.weight, lefts[0], rights[0])
        return LowRankWeight(self.base_layer.weight, torch.cat(lefts, -1), torch.cat(rights, -2))

    def _show(self, module: nn.Module, args: Any) -> None:
        if adapters := self.acting:
            # an entry of __dict__ is found before the parameter of this name
            module.__dict__[self.base_layer.name] = self.low_rank_sum(adapters)

    def _hide(self, module: nn.Module, args: Any, output: Any) -> None:
        module.__dict__.pop(self.base_layer.name, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute x·W'ᵀ over the last dimension, for each expert, W' with the active adapters in it."""
        adapters, weight = self.acting, self.base_layer.weight
        effective: Any = self.low_rank_sum(adapters) if adapters else weight
        return torch.matmul(x, effective.mT)

    def probe(self) -> Tensor:
        return noise((32, self.base_layer.weight.shape[-1]), self.base_layer)

    def delta(self, adapter: str) -> Tensor:
        left, right = self.low_rank_factors(adapter)
        return left @ right

    def merged_weight(self, adapters: list[str]) -> Tensor:
        if self.base_layer.weight.ndim == 2:
            return super().merged_weight(adapters)
        total = self.low_rank_sum(adapters)
        merged = torch.empty_like(total.weight)
        for expert in range(self.experts):  # one expert's ΔW at a time
            merged[expert] = LowRankWeight(total.weight[expert], total.left[expert], total.right[expert]).dense()
        return merged

    def weight_updates(self, adapters: list[str]) -> Iterable[Tensor]:
        if self.base_layer.weight.ndim == 2:
            return super().weight_updates(adapters)
        total = self.low_rank_sum(adapters)
        return (left @ right for left, right in zip(total.left, total.right, strict=True))  # one expert's at a time

    def weight_slices(self, weight: Tensor) -> Sequence[Tensor]:
        return super().weight_slices(weight) if weight.ndim == 2 else weight.unbind()


class LoraInProjection(LoraParameter):
    """LoRA on the packed projection of ``nn.MultiheadAttention``, [3·dim, dim]; its output projection is a LoRA layer.

    The attention calls neither: it reads both weights. While it runs, their names lead to W + ΔW. As in PEFT, dropout does
    not act here.
    """

    shown_as = "lora.MultiheadAttention"

    def _show(self, module: nn.Module, args: Any) -> None:
        out: Any = module.out_proj
        for owner, name, layer in ((module, self.base_layer.name, self), (out, "weight", out)):
            if isinstance(layer, LoraPair) and (adapters := layer.acting):
                owner.__dict__[name] = layer.merged_weight(adapters).to(layer.base_layer.weight.dtype)

    def _hide(self, module: nn.Module, args: Any, output: Any) -> None:
        super()._hide(module, args, output)
        module.out_proj.__dict__.pop("weight", None)  # type: ignore[union-attr]

    def low_rank_sum(self, adapters: list[str]) -> Any:
        """Return W + Σ ΔW."""
        return self.merged_weight(adapters)


class LoraOutProjection(LoraLinear):
    """LoRA on the output projection of ``nn.MultiheadAttention``, with twice the usual s.

    PEFT adds this update twice, in forward as in merging (release 0.21.2); an adapter must mean the same in both.
    """

    def add_adapter(self, adapter: str, config: PeftConfig, r: int, alpha: float) -> None:
        super().add_adapter(adapter, config, r, alpha)
        self.scaling[adapter] *= 2
        self.configured_scaling[adapter] *= 2


def attention_error(attention: nn.MultiheadAttention, config: PeftConfig) -> str | None:
    """Return why an attention cannot be adapted with these settings; None if it can."""
    if attention.in_proj_weight is None:
        return "has separate projections of query, key and value; LoRA adapts the packed one"
    return "is read by its weights, so lora_bias cannot act" if config.lora_bias else None


def attention_targets(target: Target) -> list[Target]:
    """Return the two places of an attention that get an A and a B: the packed projection, and the output projection."""
    packed = replace(target, name=f"{target.name}.in_proj_weight", parameter=True)
    return [packed, replace(target, name=f"{target.name}.out_proj")]
