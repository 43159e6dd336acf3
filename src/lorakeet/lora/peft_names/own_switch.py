"""A layer's own choice of adapters, where a program switches single layers instead of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class OwnSwitch:
    """The active adapters of one layer; a mixed batch and a disabled model hold for it as for all.

    Attributes:
        shared: The active adapters of the model.
        active: Names of the layer's active adapters.
        own_enabled: Whether any adapter acts in this layer while the model is enabled.
    """

    def __init__(self, shared: Any) -> None:
        self.shared, self.active, self.own_enabled = shared, shared.active, True

    @property
    def enabled(self) -> bool:
        """Whether any adapter acts in this layer."""
        return self.own_enabled and self.shared.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.own_enabled = enabled

    @property
    def rows(self) -> tuple[str, ...] | None:
        """In a mixed batch, the adapter of each row."""
        return self.shared.rows


def own_switch(layer: Any) -> OwnSwitch:
    """Return the layer's own switch; it is made if the layer uses the model's."""
    if not isinstance(layer.switch, OwnSwitch):
        layer.switch = OwnSwitch(layer.switch)
    return layer.switch


def chosen_names(model: Any) -> list[str]:
    """Return the names of the adapters that are active in any layer, in order; without layers, those of the model."""
    switches = [part.switch for part in model.lora_parts()] or [model.switch]
    return list(dict.fromkeys(name for switch in switches for name in switch.active))


@contextmanager
def switched_for_merge(model: Any, named: Sequence[str]) -> Iterator[None]:
    """Activate what a merge puts into each layer; the choice of before comes back if the block fails.

    Args:
        model: A model with adapters.
        named: Adapters that all layers merge; if empty, each layer merges its active ones beside those that it has merged.
    """
    before = [(part, part.switch, part.switch.active) for part in (*model.lora_parts(), model)]
    try:
        if named:
            model.switch.active = tuple(named)
        for part in model.lora_parts():
            part.switch = model.switch if named else part.switch
            merged = getattr(part, "merged_adapters", ())
            part.switch.active = tuple(dict.fromkeys((*merged, *part.switch.active)))
        yield
    except BaseException:
        for part, switch, active in before:
            part.switch, switch.active = switch, active
        raise


def merged_here(layer: Any) -> list[str]:
    """Return the adapters that a merge puts into a layer: the active ones, unless the layer itself is disabled."""
    disabled = isinstance(layer.switch, OwnSwitch) and not layer.switch.own_enabled
    return [] if disabled else [name for name in layer.switch.active if name in layer.r]


class SwitchNames(nn.Module):
    """PEFT's names for the choice of adapters in one layer; a parent class of adapted layers and saved modules."""

    @property
    def active_adapters(self: Any) -> list[str]:
        """Names of the active adapters."""
        return list(self.switch.active)

    @property
    def active_adapter(self: Any) -> list[str]:
        """The same; PEFT has both names."""
        return list(self.switch.active)

    @property
    def disable_adapters(self: Any) -> bool:
        """Whether no adapter acts."""
        return not self.switch.enabled

    def available_adapters(self: Any) -> list[str]:
        """Return the names of the adapters that have a part here, sorted."""
        return sorted(self.adapters)

    _get_available_adapters = available_adapters

    def enable_adapters(self: Any, enabled: bool) -> None:
        """Let the adapters act here, or none; :meth:`LoraModel.enable_adapter_layers` does so for all layers."""
        own_switch(self).enabled = enabled
        for adapter in self.adapters:
            self.set_trainable(adapter, enabled and adapter in self.switch.active)

    def set_adapter(self: Any, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate adapters in this layer alone, until the model's ``set_adapter``; they are trainable then."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        own_switch(self).active = names
        for adapter in self.adapters:
            self.set_trainable(adapter, adapter in names and not inference_mode)

    def set_requires_grad(self: Any, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable in this layer, or freeze them."""
        for adapter in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.set_trainable(adapter, requires_grad)
