"""Lorakeet: LoRA fine-tuning of transformer models that is fast and never fails silently.

The names known from ``peft`` have the same meaning and defaults here; a few are Lorakeet's own. Importing this package
imports neither torch nor transformers: each name is loaded on first access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorakeet._version import __version__ as __version__
from lorakeet.errors import LorakeetError as LorakeetError

if TYPE_CHECKING:
    from lorakeet.adapter.peft_model import PeftModel as PeftModel
    from lorakeet.adapter.peft_model import get_peft_model as get_peft_model
    from lorakeet.base.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from lorakeet.base.load import load_base as load_base
    from lorakeet.config.adalora import AdaLoraConfig as AdaLoraConfig
    from lorakeet.config.vera import VeraConfig as VeraConfig
    from lorakeet.log import LorakeetWarning as LorakeetWarning
    from lorakeet.lora.config import LoraConfig as LoraConfig
    from lorakeet.lora.config import PeftConfig as PeftConfig
    from lorakeet.lora.config import PeftType as PeftType
    from lorakeet.lora.config import TaskType as TaskType
    from lorakeet.lora.initialization.eva_weights import get_eva_state_dict as get_eva_state_dict
    from lorakeet.lora.initialization.eva_weights import initialize_lora_eva_weights as initialize_lora_eva_weights
    from lorakeet.lora.initialization.settings import EvaConfig as EvaConfig
    from lorakeet.lora.initialization.settings import LoftQConfig as LoftQConfig
    from lorakeet.lora.layer import LoraLayer as LoraLayer
    from lorakeet.lora.model import LoraModel as LoraModel
    from lorakeet.lora.variants.bdlora import BdLoraConfig as BdLoraConfig
    from lorakeet.lora.variants.kasa import KasaConfig as KasaConfig
    from lorakeet.lora.variants.velora import VeloraConfig as VeloraConfig
    from lorakeet.peft_api.auto_model import AutoPeftModel as AutoPeftModel
    from lorakeet.peft_api.auto_model import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from lorakeet.peft_api.auto_model import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from lorakeet.peft_api.auto_model import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from lorakeet.peft_api.auto_model import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from lorakeet.peft_api.auto_model import (
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
    )
    from lorakeet.peft_api.auto_model import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from lorakeet.peft_api.functional import cast_adapter_dtype as cast_adapter_dtype
    from lorakeet.peft_api.functional import check_if_peft_model as check_if_peft_model
    from lorakeet.peft_api.functional import delete_adapter as delete_adapter
    from lorakeet.peft_api.functional import infer_device as infer_device
    from lorakeet.peft_api.functional import load_peft_weights as load_peft_weights
    from lorakeet.peft_api.functional import rescale_adapter_scale as rescale_adapter_scale
    from lorakeet.peft_api.functional import set_adapter as set_adapter
    from lorakeet.peft_api.functional import set_requires_grad as set_requires_grad
    from lorakeet.peft_api.hotswap import hotswap_adapter as hotswap_adapter
    from lorakeet.peft_api.hotswap import hotswap_adapter_from_state_dict as hotswap_adapter_from_state_dict
    from lorakeet.peft_api.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
    from lorakeet.peft_api.injection import inject_adapter_in_model as inject_adapter_in_model
    from lorakeet.peft_api.loftq import replace_lora_weights_loftq as replace_lora_weights_loftq
    from lorakeet.peft_api.other_names import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
    from lorakeet.peft_api.other_names import BaseTuner as BaseTuner
    from lorakeet.peft_api.other_names import BaseTunerLayer as BaseTunerLayer
    from lorakeet.peft_api.other_names import ModulesToSaveWrapper as ModulesToSaveWrapper
    from lorakeet.peft_api.other_names import TrainableTokensWrapper as TrainableTokensWrapper
    from lorakeet.peft_api.other_names import get_layer_status as get_layer_status
    from lorakeet.peft_api.other_names import get_model_status as get_model_status
    from lorakeet.peft_api.other_names import get_peft_config as get_peft_config
    from lorakeet.peft_api.other_names import (
        prepare_model_for_gradient_checkpointing as prepare_model_for_gradient_checkpointing,
    )
    from lorakeet.peft_api.state_dict import get_base_model_state_dict as get_base_model_state_dict
    from lorakeet.peft_api.state_dict import get_peft_model_state_dict as get_peft_model_state_dict
    from lorakeet.peft_api.state_dict import set_base_model_state_dict as set_base_model_state_dict
    from lorakeet.peft_api.state_dict import set_peft_model_state_dict as set_peft_model_state_dict
    from lorakeet.peft_api.task_models import PeftModelForCausalLM as PeftModelForCausalLM
    from lorakeet.peft_api.task_models import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from lorakeet.peft_api.task_models import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from lorakeet.peft_api.task_models import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from lorakeet.peft_api.task_models import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from lorakeet.peft_api.task_models import PeftModelForTokenClassification as PeftModelForTokenClassification
    from lorakeet.quant.hf_quantizer import Int8Config as Int8Config
    from lorakeet.quant.hf_quantizer import Nf4Config as Nf4Config
    from lorakeet.train.lorafa import create_lorafa_optimizer as create_lorafa_optimizer
    from lorakeet.train.loraplus import create_loraplus_optimizer as create_loraplus_optimizer
    from lorakeet.train.trainer import Trainer as Trainer

#: Module -> public names that it defines.
_NAMES = {
    "config.adalora": "AdaLoraConfig",
    "config.vera": "VeraConfig",
    "lora.config": "LoraConfig PeftConfig PeftType TaskType",
    "lora.initialization.settings": "EvaConfig LoftQConfig",
    "lora.layer": "LoraLayer",
    "lora.model": "LoraModel",
    "lora.variants.bdlora": "BdLoraConfig",
    "lora.variants.kasa": "KasaConfig",
    "lora.variants.velora": "VeloraConfig",
    "adapter.peft_model": "PeftModel get_peft_model",
    "base.kbit": "prepare_model_for_kbit_training",
    "base.load": "load_base",
    "log": "LorakeetWarning",
    "quant.hf_quantizer": "Int8Config Nf4Config",
    "train.lorafa": "create_lorafa_optimizer",
    "train.loraplus": "create_loraplus_optimizer",
    "train.trainer": "Trainer",
    "peft_api.auto_model": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
    "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
    "AutoPeftModelForTokenClassification",
    "lora.initialization.eva_weights": "get_eva_state_dict initialize_lora_eva_weights",
    "peft_api.functional": "cast_adapter_dtype check_if_peft_model delete_adapter infer_device load_peft_weights "
    "rescale_adapter_scale set_adapter set_requires_grad",
    "peft_api.hotswap": "hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap",
    "peft_api.injection": "inject_adapter_in_model",
    "peft_api.loftq": "replace_lora_weights_loftq",
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
