"""PEFT's auto classes: an adapter's folder or hub id alone gives the base that it names, with the adapter on it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

import transformers

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.architectures import AUTO_CLASSES
from lorakeet.errors import AdapterError
from lorakeet.lora.config import DOWNLOAD_ARGUMENTS, PeftConfig
from lorakeet.lora.lifecycle.adapter_files import find_adapter_file

#: Packages from which the class of a base may be imported, if only the adapter's file names it.
ALLOWED_PACKAGES = ("transformers", "lorakeet")
#: Arguments of :meth:`PeftModel.from_pretrained`; all others are the base's.
_ADAPTER = ("autocast_adapter_dtype", "ephemeral_gpu_offload", "allow_other_base", "allow_untrained", "subfolder")


class AutoPeftModel:
    """The base that an adapter names and the adapter; its class is that which ``auto_mapping`` in the adapter's file names.

    Attributes:
        task_type: The task of the adapters that the class opens; None: adapters without a task.
    """

    task_type: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} is made by from_pretrained(path or hub id of the adapter), not by its constructor"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        allow_local_base: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base that an adapter names, and put the adapter on it.

        Args:
            pretrained_model_name_or_path: Folder or hub id of the adapter.
            adapter_name: The name to give it here.
            is_trainable: Whether to continue its training.
            config: Used instead of the adapter's own ``adapter_config.json``.
            revision: Revision of the adapter on the hub; the base's is in the adapter's settings.
            import_allowlist: Packages from which a base's class may be imported; left out: :data:`ALLOWED_PACKAGES`.
            allow_local_base: Whether a base that the adapter names by a path of this machine is loaded.
            **kwargs: Arguments of the base's ``from_pretrained`` (``dtype``, ``device_map``, ``token``, …), and of
                :meth:`PeftModel.from_pretrained`.

        Raises:
            AdapterError: the adapter is for another task, or names no base or class; and see
                :meth:`PeftModel.from_pretrained`.
        """
        name = pretrained_model_name_or_path
        own = {key: kwargs.pop(key) for key in _ADAPTER if key in kwargs}
        kwargs.setdefault("trust_remote_code", False)  # else transformers would ask at the terminal
        hub = {key: kwargs[key] for key in DOWNLOAD_ARGUMENTS if key in kwargs}
        where = {"revision": revision, "subfolder": own.get("subfolder"), **hub}
        settings = config or PeftConfig.from_pretrained(name, **where)
        base_class = cls._base_class(name, settings, import_allowlist or ALLOWED_PACKAGES)
        base_name = settings.base_model_name_or_path if allow_local_base else settings.named_base(name)
        if not base_name:
            raise AdapterError(f"adapter {str(name)!r} names no base", "load the base, then PeftModel.from_pretrained")
        base = base_class.from_pretrained(base_name, revision=settings.revision, **kwargs)
        if find_adapter_file(name, "tokenizer_config.json", **where) is not None:
            trust = kwargs.get("trust_remote_code", False)
            _make_room(
                base, transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust)
            )
        return PeftModel.from_pretrained(
            base, name, adapter_name, is_trainable, config, revision=revision, **own, **hub
        )

    @classmethod
    def _base_class(cls, name: str | Path, config: PeftConfig, allowed: Any) -> Any:
        if config.task_type is not None:
            if config.task_type == cls.task_type:
                return AUTO_CLASSES[cls.task_type]
            right = next((kind.__name__ for kind in _AUTO if kind.task_type == config.task_type), "no other class")
            raise AdapterError(f"adapter {str(name)!r} is for the task {config.task_type}", f"use {right}")
        if cls.task_type is not None and config.auto_mapping is None:
            return AUTO_CLASSES[cls.task_type]
        mapping = config.auto_mapping or {}
        package, kind = mapping.get("parent_library"), mapping.get("base_model_class")
        if not package or not kind:
            raise AdapterError(
                f"adapter {str(name)!r} names neither a task nor the class of its base",
                "load the base, then PeftModel.from_pretrained",
            )
        if not any(package == top or package.startswith(f"{top}.") for top in allowed):
            raise AdapterError(
                f"adapter {str(name)!r} asks to import {package!r}, which is not in the import allowlist",
                f"if you trust it: from_pretrained(..., import_allowlist=[{package!r}])",
            )
        return getattr(importlib.import_module(package), kind)


def _make_room(base: Any, tokenizer: Any) -> None:
    """Give the base's vocabulary the rows of the tokens that the adapter's tokenizer adds."""
    if hasattr(base, "get_input_embeddings") and len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A causal language model with an adapter."""

    task_type = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An encoder-decoder with an adapter."""

    task_type = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A classifier of texts with an adapter."""

    task_type = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A tagger with an adapter."""

    task_type = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """A model that marks answers in a text, with an adapter."""

    task_type = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An encoder without a head, with an adapter."""

    task_type = "FEATURE_EXTRACTION"


_AUTO = AutoPeftModel.__subclasses__()
