"""Model families, the auto class of each task in `transformers`, and the modules of a new head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lorakeet.config import TaskName
from lorakeet.errors import BaseModelError

Family = Literal["decoder", "encoder", "encoder-decoder"]

#: Task -> auto class of `transformers`.
AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
    "MASKED_LM": AutoModelForMaskedLM,
}

#: Family -> the task that it was pretrained for, which needs no new head.
DEFAULT_TASKS: dict[Family, TaskName] = {
    "decoder": "CAUSAL_LM",
    "encoder": "FEATURE_EXTRACTION",
    "encoder-decoder": "SEQ_2_SEQ_LM",
}

#: Auto classes of tasks without a new head: a weight missing from the checkpoint is an error, not a fresh initialization.
NO_NEW_HEAD = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM)


def family(config: PreTrainedConfig) -> Family:
    """Return the family of an architecture; an encoder is one with a masked language model."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    encodes = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return "encoder" if encodes else "decoder"


def check_task(task: str, config: PreTrainedConfig, name: str) -> None:
    """Check that `transformers` has a model of this architecture for ``task``; reads no weights.

    Raises:
        BaseModelError: It has none.
    """
    known = AUTO_CLASSES[task]._model_mapping
    if type(config) in known or any(getattr(config, "auto_map", {}) or {}):
        return
    fitting = [other for other, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping]
    raise BaseModelError(
        f"{name} is a {config.model_type} model, which does not support {task}, expected {', '.join(fitting) or 'none'}",
        "choose another task with --task, or another base with --model",
    )


def own_class(config: PreTrainedConfig) -> Any:
    """Return the class that a checkpoint was saved from, with all its heads; by default that of its family's own task."""
    saved = getattr(transformers, (config.architectures or [""])[0], None)
    return saved or AUTO_CLASSES[DEFAULT_TASKS[family(config)]]


def fresh_modules(model: PreTrainedModel, fresh: Iterable[str]) -> list[str]:
    """Return the modules with randomly initialized weights, which must be trained in full and saved with the adapter.

    Outside the base model that is the head (``classifier.dense.weight`` gives ``classifier``), inside it the first module
    below (``bert.pooler.dense.weight`` gives ``pooler``).

    Args:
        model: The model.
        fresh: Names of the weights that the checkpoint lacks.
    """
    prefix = f"{model.base_model_prefix}."
    names = (key.removeprefix(prefix) for key in fresh)
    return list(dict.fromkeys(name.partition(".")[0] for name in names))
