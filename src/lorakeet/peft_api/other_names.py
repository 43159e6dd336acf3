"""PEFT's other names for Lorakeet's classes and functions."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakeet.log import LorakeetWarning
from lorakeet.lora.config import LoraConfig, PeftConfig
from lorakeet.lora.conv import LoraConv1d, LoraConv2d, LoraConv3d
from lorakeet.lora.embedding import LoraEmbedding
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.linear import LoraLinear
from lorakeet.lora.model import LoraModel
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.peft_names.model import prepare_for_gradient_checkpointing
from lorakeet.lora.peft_names.saved_module import SavedModuleNames
from lorakeet.lora.peft_names.status import layer_status, model_status
from lorakeet.lora.target_parameters import LoraParameter
from lorakeet.lora.targeting import excluded, layer_wanted, matches
from lorakeet.lora.trainable_tokens import TrainableTokens

__all__ = [
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "ModulesToSaveWrapper",
    "ParamWrapper",
    "PeftWarning",
    "TrainableTokensWrapper",
    "check_target_module_exists",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "prepare_model_for_gradient_checkpointing",
]

BaseTuner = LoraModel
#: The layers of ``peft.tuners.lora``.
Linear, Embedding, Conv1d, Conv2d, Conv3d = LoraLinear, LoraEmbedding, LoraConv1d, LoraConv2d, LoraConv3d
BaseTunerLayer = LoraLayer
PeftWarning = LorakeetWarning
ParamWrapper = LoraParameter
ModulesToSaveWrapper = SavedModule
TrainableTokensWrapper = TrainableTokens
#: In PEFT the parent of both wrappers.
AuxiliaryTrainingWrapper = SavedModuleNames
get_layer_status, get_model_status = layer_status, model_status
prepare_model_for_gradient_checkpointing = prepare_for_gradient_checkpointing


def check_target_module_exists(config: PeftConfig, key: str) -> bool:
    """Whether the settings choose the layer of this name."""
    if config.target_modules is None or excluded(key, config):
        return False
    return matches(key, config.target_modules) and layer_wanted(key, config)


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return the parent of a module, the module, and its name in the parent."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), model.get_submodule(key), name


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Make the settings of an adapter from a dictionary with its ``peft_type``."""
    return LoraConfig.from_dict(config_dict)
