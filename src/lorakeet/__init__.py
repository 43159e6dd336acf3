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
    from lorakeet.lora.config import LoraConfig, PeftConfig, TaskType
    from lorakeet.quant.hf_quantizer import Int8Config
    from lorakeet.train.trainer import Trainer

#: Public name -> module that defines it.
_MODULES = {
    "LoraConfig": "lorakeet.lora.config",
    "PeftConfig": "lorakeet.lora.config",
    "TaskType": "lorakeet.lora.config",
    "PeftModel": "lorakeet.adapter.peft_model",
    "get_peft_model": "lorakeet.adapter.peft_model",
    "prepare_model_for_kbit_training": "lorakeet.base.kbit",
    "load_base": "lorakeet.base.load",
    "Int8Config": "lorakeet.quant.hf_quantizer",
    "Trainer": "lorakeet.train.trainer",
}

__all__ = [
    "Int8Config",
    "LoraConfig",
    "LorakeetError",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "Trainer",
    "__version__",
    "get_peft_model",
    "load_base",
    "prepare_model_for_kbit_training",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lorakeet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
