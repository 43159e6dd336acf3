"""PEFT's classes of a model with adapters, one for each task: ``isinstance`` asks for the task of the active adapter."""

from __future__ import annotations

from typing import Any, ClassVar

from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.lora.config import PeftConfig


class _OfTask(type):
    """Metaclass of the classes of tasks: what is an instance, and what the constructor makes."""

    task_type: str

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, PeftModel) and instance.active_peft_config.task_type == cls.task_type

    def __call__(cls, model: Any, peft_config: PeftConfig, adapter_name: str = "default", **settings: Any) -> Any:
        return get_peft_model(model, peft_config, adapter_name, **settings)


class _TaskModel(metaclass=_OfTask):
    """A model with an adapter for one task; every such model is a :class:`PeftModel`."""

    task_type: ClassVar[str]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PeftModel:
        """Put a saved adapter on a model; see :meth:`PeftModel.from_pretrained`."""
        return PeftModel.from_pretrained(*args, **kwargs)


class PeftModelForCausalLM(_TaskModel):
    """A causal language model."""

    task_type = "CAUSAL_LM"


class PeftModelForSeq2SeqLM(_TaskModel):
    """An encoder-decoder."""

    task_type = "SEQ_2_SEQ_LM"


class PeftModelForSequenceClassification(_TaskModel):
    """A classifier of texts."""

    task_type = "SEQ_CLS"


class PeftModelForTokenClassification(_TaskModel):
    """A tagger."""

    task_type = "TOKEN_CLS"


class PeftModelForQuestionAnswering(_TaskModel):
    """A model that marks answers in a text."""

    task_type = "QUESTION_ANS"


class PeftModelForFeatureExtraction(_TaskModel):
    """An encoder without a head."""

    task_type = "FEATURE_EXTRACTION"
