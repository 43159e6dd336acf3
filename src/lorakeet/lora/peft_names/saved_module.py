"""PEFT's names for the attributes and verbs of a module that is trained whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorakeet.lora.peft_names.own_switch import own_switch


class SavedModuleNames(nn.Module):
    """PEFT's names, as a parent class of :class:`~lorakeet.lora.modules_to_save.SavedModule`."""

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()

    def _get_name(self) -> str:
        return "ModulesToSaveWrapper"

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
        """Whether the base's own module runs."""
        return not self.switch.enabled

    def available_adapters(self: Any) -> list[str]:
        """Return the names of the adapters that have a copy, sorted."""
        return sorted(self.modules_to_save)

    _get_available_adapters = available_adapters

    def enable_adapters(self: Any, enabled: bool) -> None:
        """Let the copies run, or the base's own module."""
        own_switch(self).enabled = enabled
        for adapter in self.modules_to_save:
            self.set_trainable(adapter, enabled and adapter in self.switch.active)

    def set_adapter(self: Any, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter's copy in this module alone, until the model's ``set_adapter``; it is trainable then."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        own_switch(self).active = names
        for adapter in self.modules_to_save:
            self.set_trainable(adapter, adapter in names and not inference_mode)

    def set_requires_grad(self: Any, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make copies trainable, or freeze them."""
        for adapter in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.set_trainable(adapter, requires_grad)
