"""The contract of a variant: how an adapter starts, what it adds to a layer's output, its merged weight, its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from lorakeet.config import LoraSettings


class AdaptedLayer(Protocol):
    """The parts of a LoRA layer that a variant may use (:class:`lorakeet.lora.layer.LoraLayer` has them).

    Attributes:
        base_layer: The frozen layer.
        scaling: The factor s of each adapter, by name.
        channel_dim: Dimension of the base layer's weight that counts output channels.
        leaf: Last part of the layer's name in the model.
        notes: Values that the variant of each adapter keeps, by the adapter's name.
        training: Whether the layer is in training mode.
    """

    base_layer: Any
    scaling: dict[str, float]
    leaf: str
    notes: dict[str, Any]
    training: bool

    @property
    def channel_dim(self) -> int:
        """Dimension of the base layer's weight that counts output channels."""

    def initialize(self, adapter: str, how: bool | str) -> None:
        """Initialize A and B as ``init_lora_weights`` says."""

    def dropped(self, adapter: str, x: Tensor) -> Tensor:
        """Return dropout(x); ``x`` itself where no dropout acts."""

    def low_rank(self, adapter: str, dropped: Tensor) -> Tensor:
        """Compute s·B·A·x for an input after dropout, in the adapter's dtype."""

    def pair(self, adapter: str) -> tuple[Any, Any]:
        """Return A and B as modules, of a linear layer or a convolution."""

    def set_pair(self, adapter: str, a: nn.Module, b: nn.Module) -> None:
        """Take A and B as the adapter's."""

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r], of a convolution with the kernel flattened into ``in``."""

    def without_bias(self, h: Tensor) -> Tensor:
        """Return an output of the layer without the base layer's bias."""

    def for_outputs(self, channels: Tensor) -> Tensor:
        """Return a vector [out] in a shape that broadcasts with outputs."""

    def for_weight(self, channels: Tensor) -> Tensor:
        """Return a vector [out] in a shape that broadcasts with the base layer's weight."""

    def delta(self, adapter: str) -> Tensor:
        """Return s·B·A in the base weight's layout, in the adapter's dtype."""

    def add_part(self, name: str, adapter: str, part: nn.Parameter | nn.Module) -> None:
        """Give the adapter a further part; ``name`` is one of :attr:`Variant.parameters`."""

    def add_buffer(self, name: str, adapter: str, value: Tensor) -> None:
        """Give the adapter a tensor that is saved and not trained, or another value of it; one of :attr:`Variant.buffers`."""

    def part(self, name: str, adapter: str) -> Any:
        """Return what :meth:`add_part` or :meth:`add_buffer` gave the adapter."""


class Variant:
    """A variant of LoRA. An instance has no state: an adapter's parameters are in its layers.

    Attributes:
        name: The variant's name in messages.
        settings: Keys of ``adapter_config.json`` that belong to the variant -> values that mean "not used". Any other value
            chooses the variant.
        parameters: Names of the parameters (or modules of parameters) that it adds to each layer's A and B. Each begins with
            ``lora_``.
        buffers: Names of the tensors that it adds and does not train.
        types: Classes of the settings that are objects; a dictionary of their fields is accepted too.
        additive: Whether W' = W + ΔW, where ΔW depends on this adapter alone. Otherwise an adapter cannot be combined with
            others into one, or shared by tied layers; several active ones apply in their order.
        takes_part: Whether an adapter takes a part out of the base's weight while it acts.
        stores_pair: Whether each layer's A and B are tensors of the adapter.
        fused: Whether ``kernels.lora_linear`` computes this variant's equation, up to :meth:`output_scale`.
        refused_by: Tools that cannot load such an adapter (names of :mod:`lorakeet.adapter.compatibility`) -> the reason.
    """

    name: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    parameters: ClassVar[tuple[str, ...]] = ()
    buffers: ClassVar[tuple[str, ...]] = ()
    types: ClassVar[Mapping[str, type]] = {}
    additive: ClassVar[bool] = True
    takes_part: ClassVar[bool] = False
    stores_pair: ClassVar[bool] = True
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

    def not_linear(self, target: nn.Module | nn.Parameter) -> str | None:
        """Return why a variant of linear layers alone cannot adapt a layer; None if it can."""
        other = isinstance(target, nn.Embedding | nn.MultiheadAttention | nn.modules.conv._ConvNd)
        return f"is a {type(target).__name__}, which {self.name} cannot adapt" if other else None

    def shared(self, settings: Any, bases: Iterable[nn.Module]) -> Any:
        """Return what all layers of a new adapter share, for :attr:`AdaptedLayer.notes`; None for nothing.

        Args:
            settings: The adapter's settings.
            bases: The layers that it will adapt.
        """
        return None

    # -- a layer ----------------------------------------------------------------------------------------------------

    def init(self, layer: AdaptedLayer, adapter: str, settings: LoraSettings) -> None:
        """Initialize the adapter's A and B, which ``layer`` has made, and add further parameters."""
        layer.initialize(adapter, settings.init_lora_weights)

    def factors(self, layer: AdaptedLayer, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r] as they are multiplied.

        Args:
            layer: The adapted layer.
            adapter: The adapter's name.
            a: A as it is trained.
            b: B as it is trained.
        """
        return a, b

    def output_scale(self, layer: AdaptedLayer, adapter: str) -> Tensor | None:
        """Return c [out] in h = c∘(W₀x + s·B·A·x) + b, which a fused variant without dropout computes; None for 1."""
        return None

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
        """Map names in the file to names in the state dict, both relative to the layer, for parameters and buffers."""
        return {name: f"{name}.{adapter}" for name in (*self.parameters, *self.buffers)}

    def shared_names(self, adapter: str, settings: Any) -> dict[str, str]:
        """Map names in the file to names relative to any layer, of the tensors that all layers share."""
        return {}

    def saved_pair(self, leaf: str, tensors: Mapping[str, Tensor], settings: Any) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r] of a layer as they are multiplied.

        Args:
            leaf: Last part of the layer's name.
            tensors: ``A``, ``B`` and the variant's own, as the file has them.
            settings: The adapter's settings.
        """
        return tensors["A"], tensors["B"]
