"""PEFT's names for the attributes and verbs of a module that is trained whole."""

from __future__ import annotations

from lorakeet.lora.peft_names.own_switch import SwitchNames


class SavedModuleNames(SwitchNames):
    """PEFT's names, as a parent class of :class:`~lorakeet.lora.modules_to_save.SavedModule`."""

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()

    def _get_name(self) -> str:
        return "ModulesToSaveWrapper"
