"""What a model is asked to do, in the terms of `transformers`: its family, the auto class, the parts that begin at random."""

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

AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
    "MASKED_LM": AutoModelForMaskedLM,
}

#: What a family does without a new head.
PLAIN: dict[Family, TaskName] = {
    "decoder": "CAUSAL_LM",
    "encoder": "FEATURE_EXTRACTION",
    "encoder-decoder": "SEQ_2_SEQ_LM",
}

#: Tasks whose model is all in the base's files: a weight that is missing there is damage, and no new head.
WHOLE = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM)


def family(config: PreTrainedConfig) -> Family:
    """Whether a model of this configuration reads, writes, or does one after the other."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    reads = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return "encoder" if reads else "decoder"


def check_task(task: str, config: PreTrainedConfig, name: str) -> None:
    """See that the architecture has a model for ``task``, before any weight is read.

    Raises:
        BaseModelError: it has none.
    """
    known = AUTO_CLASSES[task]._model_mapping
    if type(config) in known or any(getattr(config, "auto_map", {}) or {}):
        return
    fitting = [other for other, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping]
    raise BaseModelError(
        f"{name} is a {config.model_type} model, which cannot do {task}; it can do {', '.join(fitting) or 'none'}",
        "choose another task with --task, or another base with --model",
    )


def own_class(config: PreTrainedConfig) -> Any:
    """The class that a base's files were written by, with all of its heads; else what its family does without a new one."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named or AUTO_CLASSES[PLAIN[family(config)]]


def fresh_modules(model: PreTrainedModel, fresh: Iterable[str]) -> list[str]:
    """The modules that hold new, random weights: they must be trained whole and saved with the adapter.

    A head stands for all of its layers: ``classifier.dense.weight`` gives ``classifier``; what the files lack inside the base
    model is named by its module: ``bert.pooler.dense.weight`` gives ``pooler``.
    """
    prefix = f"{model.base_model_prefix}."
    names = (key.removeprefix(prefix) for key in fresh)
    return list(dict.fromkeys(name.partition(".")[0] for name in names))
