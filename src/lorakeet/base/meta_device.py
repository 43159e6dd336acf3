"""A model's shape without its weights: on the meta device, in seconds and next to no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lorakeet.base.source import find_source
from lorakeet.errors import BaseModelError

#: Public configurations that come with Lorakeet, so that these models can be planned without a network.
CONFIGS = Path(__file__).with_name("configs")


def meta_model(name_or_config: str | PreTrainedConfig, *, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The model of a configuration, every parameter on the meta device: modules, names and shapes, no numbers.

    Args:
        name_or_config: a configuration; or a folder, GGUF file or hub id, of which only the configuration is read; or
            one of those shipped, ``facebook/opt-6.7b`` and ``bigscience/bloomz-7b1``.
        auto_class: the `transformers` auto class of the task.

    Raises:
        BaseModelError: there is no such model, or its architecture is unknown.
    """
    config = read_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    with torch.device("meta"):
        model = auto_class.from_config(config)
    return model.requires_grad_(False).eval()


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of a model by name; its ``_name_or_path`` is the public name."""
    shipped = CONFIGS / f"{name.replace('/', '--')}.json"
    try:
        if shipped.exists() and not Path(name).exists():
            config, known_as = AutoConfig.from_pretrained(shipped), name
        else:
            source = find_source(name)
            gguf = {"gguf_file": source.path.name} if source.kind == "gguf" else {}
            config = AutoConfig.from_pretrained(source.path.parent if gguf else source.path, **gguf)
            known_as = source.name
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, BaseModelError):
            raise
        raise BaseModelError(f"the configuration of {name} cannot be read: {error}") from error
    config._name_or_path = known_as
    return config
