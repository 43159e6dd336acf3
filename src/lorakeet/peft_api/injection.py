"""PEFT's low-level entry: adapters inside a model that keeps its class's own verbs for saving and loading."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.errors import ConfigError
from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.default_targets import resolve_config
from lorakeet.lora.inject import freeze_base, plan_injection
from lorakeet.lora.lifecycle.adoption import adopt
from lorakeet.lora.lifecycle.rollback import all_or_nothing
from lorakeet.lora.model import LoraModel
from lorakeet.lora.peft_names.model import reallocate


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put a new adapter on ``model``, in place, without the methods of ``PeftModel`` that save and load it.

    Args:
        peft_config: The settings.
        model: Any module; the same object comes back, with the methods of ``LoraModel``.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Leave the adapter on the meta device; ``set_peft_model_state_dict`` brings its tensors.
        state_dict: Tensors of a saved adapter: the layers that they name are adapted instead of those that the settings
            name. Their values are not loaded; ``set_peft_model_state_dict`` does that.

    Raises:
        TargetError: some of ``target_modules`` match nothing; the model is as before then.
    """
    if state_dict is not None:
        peft_config = _targeting(peft_config, model, state_dict)
    with all_or_nothing(model):
        new = not isinstance(model, LoraModel)
        adapted = adopt(model, LoraModel)
        adapted.add_adapter(adapter_name, peft_config, strict=state_dict is None)
        if new:
            freeze_base(adapted)
        if low_cpu_mem_usage:
            reallocate(adapted, adapter_name, "meta")
        adapted.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return adapted


def _targeting(config: PeftConfig, model: nn.Module, state_dict: Mapping[str, Tensor]) -> PeftConfig:
    """Return the settings with the layers that the tensors name; a warning, if the settings name others."""
    if config.target_parameters:
        raise ConfigError("layers cannot be found from a state dict with target_parameters", "leave state_dict out")
    names = {
        key.removeprefix("_orig_mod.").rpartition(".lora_")[0].removeprefix(PREFIX)
        for key in state_dict
        if ".lora_" in key
    }
    planned = {target.name for target in plan_injection(model, resolve_config(model, config), strict=False).targets}
    if planned != names:
        warn(
            f"the tensors name other layers than target_modules: {len(names - planned)} that the settings lack, "
            f"{len(planned - names)} that the tensors lack; the tensors decide"
        )
    return config.model_copy(update={"target_modules": sorted(names)}, deep=True)
