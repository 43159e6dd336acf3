"""Lorakeet: LoRA fine-tuning of transformer models that is fast and never fails silently.

The names known from ``peft`` have the same meaning and defaults here; a few are Lorakeet's own. Importing this package
imports neither torch nor transformers: each name is loaded on first access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorakeet._version import __version__
from lorakeet.errors import LorakeetError

if TYPE_CHECKING:
    from lorakeet.adapter.peft_model import PeftModel, get_peft_model
    from lorakeet.base.kbit import prepare_model_for_kbit_training
    from lorakeet.base.load import load_base
    from lorakeet.lora.config import LoraConfig, PeftConfig, PeftType, TaskType
    from lorakeet.quant.hf_quantizer import Int8Config
    from lorakeet.train.trainer import Trainer

#: Module -> public names that it defines.
_NAMES = {
    "lora.config": "LoraConfig PeftConfig PeftType TaskType",
    "lora.layer": "LoraLayer",
    "lora.model": "LoraModel",
    "adapter.peft_model": "PeftModel get_peft_model",
    "base.kbit": "prepare_model_for_kbit_training",
    "base.load": "load_base",
    "log": "LorakeetWarning",
    "quant.hf_quantizer": "Int8Config",
    "train.trainer": "Trainer",
    "peft_api.auto_model": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
    "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
    "AutoPeftModelForTokenClassification",
    "peft_api.injection": "inject_adapter_in_model",
    "peft_api.other_names": "AuxiliaryTrainingWrapper BaseTuner BaseTunerLayer ModulesToSaveWrapper TrainableTokensWrapper "
    "get_layer_status get_model_status get_peft_config prepare_model_for_gradient_checkpointing",
    "peft_api.state_dict": "get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict "
    "set_peft_model_state_dict",
    "peft_api.task_models": "PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
    "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification",
}
#: Public name -> module that defines it.
_MODULES = {name: f"lorakeet.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(["LorakeetError", "__version__", *_MODULES])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lorakeet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
