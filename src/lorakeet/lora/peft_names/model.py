"""PEFT's names for the attributes and verbs of a model with adapters; the work is done by the methods that they call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.lifecycle.merged import take_apart
from lorakeet.lora.peft_names.base_view import view_of
from lorakeet.lora.peft_names.status import LayerStatus, ModelStatus, layer_status, model_status
from lorakeet.lora.variants.adalora import allocate_active, orthogonality
from lorakeet.lora.variants.kasa import penalty
from lorakeet.quant.protocol import weight_dtype


class ModelNames(nn.Module):
    """PEFT's names, as a parent class of :class:`~lorakeet.lora.model.LoraModel`."""

    #: Beginning of the names of an adapter's own parameters.
    prefix = "lora_"
    tuner_layer_cls = LoraLayer

    @property
    def base_model(self: Any) -> Any:
        """The backbone, as the base itself names it, and PEFT's view of the model in one: see :mod:`.base_view`."""
        return view_of(self)

    @property
    def active_peft_config(self: Any) -> PeftConfig:
        """The settings of the active adapter; of the first, where several are."""
        return self.peft_config[self.switch.active[0]]

    @property
    def peft_type(self: Any) -> str:
        """The method of the active adapter: LORA."""
        return self.active_peft_config.peft_type

    @property
    def has_active_enabled_adapter(self: Any) -> bool:
        """Whether an adapter acts."""
        return bool(self.switch.enabled and self.switch.active)

    @property
    def base_model_torch_dtype(self: Any) -> torch.dtype | None:
        """The base's number format."""
        return getattr(self, "dtype", None)

    @property
    def modules_to_save(self: Any) -> set[str] | None:
        """Names in the settings of all adapters of modules that are trained whole; None, if there are none."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def targeted_module_names(self: Any) -> list[str]:
        """Names of the adapted layers."""
        return [name for name, layer in self.named_modules() if isinstance(layer, LoraLayer) and layer.is_target()]

    @property
    def targeted_parameter_names(self: Any) -> list[str]:
        """Names of the adapted parameters."""
        return [
            name.replace(".lora_parameters.", ".")
            for name, layer in self.named_modules()
            if isinstance(layer, LoraLayer) and ".lora_parameters." in f".{name}"
        ]

    def store_in_base_dtype(self: Any, adapter: str) -> None:
        """Store the adapter in the number format of each base layer (``autocast_adapter_dtype=False``)."""
        for layer in self.lora_layers():
            for parameter in layer.parts(adapter) if adapter in layer.r else ():
                parameter.data = parameter.data.to(weight_dtype(layer.base_layer))

    @staticmethod
    def get_model_config(model: Any) -> dict[str, Any]:
        """Return the base's configuration as a dictionary; ``{"model_type": "custom"}`` where it has none."""
        config: Any = getattr(model, "config", None)
        values = config.to_dict() if hasattr(config, "to_dict") else config
        return values if isinstance(values, dict) else {"model_type": "custom"}

    def disable_adapter_layers(self: Any) -> None:
        """Let no adapter act, until :meth:`enable_adapter_layers`."""
        if any(config.bias != "none" for config in self.peft_config.values()):
            warn("trained biases belong to the base: disabling the adapter leaves them as they are")
        take_apart(self, "all adapters are disabled")
        self._enable(False)

    def enable_adapter_layers(self: Any) -> None:
        """Let the active adapters act again, trainable as after ``set_adapter``."""
        self._enable(True)

    def _enable(self: Any, enabled: bool) -> None:
        self.switch.enabled = enabled
        for part in self.lora_parts():
            part.switch = self.switch
        for name in self.peft_config:
            self.set_trainable(name, enabled and name in self.switch.active)

    def _get_kasa_loss(self: Any, adapter_names: str | Sequence[str] | None = None) -> torch.Tensor | float:
        """Return what KaSA adds to the loss, of the named adapters or the active ones; 0.0 where there is none."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names or self.active_adapters
        return penalty(self.lora_layers(), names)

    def orthogonality_loss(self: Any, adapter_names: str | Sequence[str] | None = None) -> torch.Tensor | float:
        """Return what AdaLoRA adds to the loss, of the named adapters or the active ones; 0.0 where there is none."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names or self.active_adapters
        return sum((orthogonality(self.lora_layers(), name) for name in names), 0.0)

    def update_and_allocate(self: Any, global_step: int) -> None:
        """Update the importance of an AdaLoRA adapter's triplets and choose its ranks, as PEFT's function of this name.

        Lorakeet's Trainer does it. Other loops call it after each step of the optimizer, before the gradients are cleared.

        Args:
            global_step: Number of the step, from 1 to ``total_step``.

        Raises:
            AdapterError: No active adapter is of AdaLoRA.
            ConfigError: Its settings do not say the steps of the training.
        """
        allocate_active(self.lora_layers(), self.active_adapters, global_step)

    def get_layer_status(self) -> list[LayerStatus]:
        """Return what each layer with adapters is and does."""
        return layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """Return what the model's adapters are and do; ``"irregular"`` where its layers differ."""
        return model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter can be expressed as LoRA: it is LoRA."""
        return True

    def prepare_model_for_gradient_checkpointing(self: Any, model: Any = None) -> Any:
        """Let the inputs of the first block require a gradient, as checkpointing of a frozen base needs."""
        return prepare_for_gradient_checkpointing(self if model is None else model)


def prepare_for_gradient_checkpointing(model: Any) -> Any:
    """Let the output of the input embedding require a gradient, so that checkpointed blocks compute one.

    Returns:
        The model.
    """
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return model


def reallocate(model: Any, adapter: str, device: str | None = None) -> None:
    """Give an adapter's parameters new memory, without values, on a device; left out: on that of each base layer."""
    for layer in model.lora_layers():
        where = device or layer.base_layer.weight.device
        own = layer.variants[adapter].parameters if adapter in layer.variants else ()
        for name in (*layer.adapter_layer_names, *own):
            table = getattr(layer, name, {})
            if adapter in table and isinstance(table[adapter], nn.Module):
                table[adapter].to_empty(device=where)
            elif adapter in table:
                old = table[adapter]
                table[adapter] = nn.Parameter(torch.empty_like(old, device=where), requires_grad=old.requires_grad)
