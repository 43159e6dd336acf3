"""PEFT's names for the attributes and verbs of a layer with adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lorakeet.errors import MergeError
from lorakeet.lora.peft_names.own_switch import SwitchNames
from lorakeet.lora.peft_names.words import BROKEN
from lorakeet.quant.protocol import weight_dtype


class LiveTable(Mapping[str, Any]):
    """Table of values by adapter that is computed at each look-up, so it follows the adapters of its layer."""

    def __init__(self, values: Callable[[], dict[str, Any]]) -> None:
        self._values = values

    def __getitem__(self, adapter: str) -> Any:
        return self._values()[adapter]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __repr__(self) -> str:
        return repr(self._values())


class LayerNames(SwitchNames):
    """PEFT's names, as a parent class of :class:`~lorakeet.lora.layer.LoraLayer`."""

    #: Tables of an adapter's parameters, by adapter.
    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    #: Tables of an adapter's further values.
    other_param_names: tuple[str, ...] = ("r", "lora_alpha", "scaling", "lora_dropout")

    @property
    def merged(self: Any) -> bool:
        """Whether the base's weight holds an adapter."""
        return bool(self.merged_adapters)

    def is_target(self) -> bool:
        """Whether the layer has an adapter because ``target_modules`` names it."""
        return True

    _all_available_adapter_names = SwitchNames.available_adapters

    def get_base_layer(self: Any) -> nn.Module:
        """Return the adapted layer of the base."""
        return self.base_layer

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """Return what merging adds to the weight."""
        return self.delta(adapter).to(weight_dtype(self.base_layer))

    @property
    def in_features(self: Any) -> int:
        """Number of features of the input; of an embedding, of its ids."""
        return _features(self.base_layer, ("in_features", "in_channels", "num_embeddings", "nx"))

    @property
    def out_features(self: Any) -> int:
        """Number of features of the output."""
        return _features(self.base_layer, ("out_features", "out_channels", "embedding_dim", "nf"))

    def merge(self: Any, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merge adapters in this layer alone; left out: the active ones.

        Raises:
            MergeError: The merged weight or bias has NaN or infinite values; the layer is as before then.
        """
        names = list(adapter_names or self.switch.active)
        self.merge_(names)
        if not all(bool(getattr(self.base_layer, name).isfinite().all()) for name in self.originals):
            self.unmerge_()
            raise MergeError(BROKEN.format(adapter=", ".join(names)))

    def unmerge(self: Any) -> None:
        """Put this layer's original weight back."""
        self.unmerge_()

    @property
    def use_dora(self: Any) -> Mapping[str, bool]:
        """Answers to whether an adapter is one of DoRA, by adapter."""
        return LiveTable(lambda: {name: "use_dora" in variant.settings for name, variant in self.variants.items()})

    @property
    def lora_bias(self: Any) -> Mapping[str, bool]:
        """Answers to whether an adapter's B has a bias, by adapter."""
        return LiveTable(lambda: {adapter: self.bias_delta(adapter) is not None for adapter in self.r})

    @property
    def lora_variant(self: Any) -> Mapping[str, Any]:
        """Variants other than plain LoRA, by adapter."""
        return LiveTable(lambda: {name: variant for name, variant in self.variants.items() if variant.settings})

    @property
    def kwargs(self) -> dict[str, Any]:
        """Further arguments of the layer: none."""
        return {}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be expressed as LoRA: it is LoRA."""
        return True

    # -- scale ------------------------------------------------------------------------------------------------------

    def set_scale(self: Any, adapter: str, scale: float) -> None:
        """Set the adapter's s to ``scale`` times the value that its settings give."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.configured_scaling[adapter]

    def scale_layer(self: Any, scale: float) -> None:
        """Multiply the active adapters' s."""
        for adapter in self.active_adapters if scale != 1 else ():
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self: Any, scale: float | None = None) -> None:
        """Divide the active adapters' s; without ``scale``, set it as the settings give it."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                whole = self.configured_scaling[adapter] if scale is None else self.scaling[adapter] / scale
                self.scaling[adapter] = whole


def _features(base: Any, names: Sequence[str]) -> int:
    """Return the first of these attributes that the layer has; the ``Conv1D`` of GPT-2 has its weight as [nx, nf]."""
    for name in names:
        if (value := getattr(base, name, None)) is not None:
            return value
    raise AttributeError(f"a {type(base).__name__} has none of {', '.join(names)}")
