"""The contract of a variant: how an adapter starts, what it adds to a layer's output, its merged weight, its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from lorakeet.config import LoraSettings


class AdaptedLayer(Protocol):
    """The parts of a LoRA layer that a variant may use (:class:`lorakeet.lora.layer.LoraLayer` has them).

    Attributes:
        base_layer: The frozen layer.
        scaling: The factor s of each adapter, by name.
    """

    base_layer: Any
    scaling: dict[str, float]

    def initialize(self, adapter: str, how: bool | str) -> None:
        """Initialize A and B as ``init_lora_weights`` says."""

    def low_rank_output(self, adapter: str, x: Tensor) -> Tensor:
        """Compute s·B·A·dropout(x), in the adapter's dtype."""

    def delta(self, adapter: str) -> Tensor:
        """Return s·B·A in the base weight's layout, in the adapter's dtype."""

    def add_parameter(self, name: str, adapter: str, value: Tensor) -> None:
        """Give the adapter a further parameter; ``name`` is one of :attr:`Variant.parameters`."""

    def parameter(self, name: str, adapter: str) -> Tensor:
        """Return a parameter that :meth:`add_parameter` gave the adapter."""


class Variant:
    """One variant of LoRA. An instance has no state: what belongs to an adapter is in its layers.

    Attributes:
        name: The variant's name in messages.
        settings: Keys of ``adapter_config.json`` that belong to the variant -> values that mean "not used". Any other value
            chooses the variant.
        parameters: Names of the parameters that it adds to each layer's A and B. Each begins with ``lora_``.
        additive: Whether W' = W + ΔW, where ΔW depends on this adapter alone. Otherwise an adapter cannot be summed with
            others, combined with them, or shared by tied layers.
        fused: Whether ``kernels.lora_linear`` computes this variant's equation.
        refused_by: Tools that cannot load such an adapter (names of :mod:`lorakeet.adapter.compatibility`) -> the reason.
    """

    name: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    parameters: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = True
    fused: ClassVar[bool] = False
    refused_by: ClassVar[Mapping[str, str]] = {}

    # -- settings ---------------------------------------------------------------------------------------------------

    def is_chosen(self, settings: Mapping[str, Any]) -> bool:
        """Whether one of the variant's settings has another value than the neutral one."""
        return any(settings.get(key, neutral) not in (neutral, None) for key, neutral in self.settings.items())

    def settings_error(self, settings: Mapping[str, Any]) -> str | None:
        """Return why the values of the variant's settings are not valid; None if they are."""
        return None

    def scaling(self, settings: LoraSettings, r: int, alpha: float) -> float:
        """Return s: α/r (Hu et al. 2021), or α/√r with ``use_rslora`` (Kalajdzievski 2023, arXiv:2312.03732)."""
        return alpha / math.sqrt(r) if settings.use_rslora else alpha / r

    def unsupported(self, target: nn.Module | nn.Parameter) -> str | None:
        """Return why the variant cannot adapt a base layer, or a parameter of ``target_parameters``; None if it can."""
        return f"is a parameter, which {self.name} cannot adapt" if isinstance(target, nn.Parameter) else None

    # -- a layer ----------------------------------------------------------------------------------------------------

    def init(self, layer: AdaptedLayer, adapter: str, settings: LoraSettings) -> None:
        """Initialize the adapter's A and B, which ``layer`` has made, and add further parameters."""
        layer.initialize(adapter, settings.init_lora_weights)

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        """Apply the adapter to one output of a layer.

        Args:
            layer: The adapted layer.
            adapter: The adapter's name.
            x: The layer's input.
            h: The output of the base layer, with the updates of the adapters before this one.

        Returns:
            The new output, with the shape and dtype of ``h``.
        """
        raise NotImplementedError

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        """Return the weight with which the base layer alone gives the adapter's output.

        Args:
            layer: The adapted layer.
            adapter: The adapter's name.
            weight: The base layer's weight in the adapter's dtype, with the adapters that were merged before this one.
        """
        raise NotImplementedError

    # -- the file ---------------------------------------------------------------------------------------------------

    def tensor_names(self, adapter: str) -> dict[str, str]:
        """Map names in the file to names in the state dict, both relative to the layer, for :attr:`parameters`."""
        return {name: f"{name}.{adapter}" for name in self.parameters}
