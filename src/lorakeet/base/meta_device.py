"""Models on the meta device: modules, names and shapes without weights, built in seconds and with little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lorakeet.base.config_checks import skeleton
from lorakeet.base.source import find_source
from lorakeet.errors import BaseModelError
from lorakeet.security.paths import exists

#: Folder of public configurations that come with Lorakeet, so that these models can be planned without a network.
CONFIGS = Path(__file__).with_name("configs")


def meta_model(name_or_config: str | PreTrainedConfig, *, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """Build the model of a configuration with every parameter on the meta device.

    Args:
        name_or_config: A configuration; or a folder, GGUF file or hub id, of which only the configuration is read; or a
            shipped one, ``facebook/opt-6.7b`` or ``bigscience/bloomz-7b1``.
        auto_class: The `transformers` auto class of the task.

    Raises:
        BaseModelError: There is no such model, or its architecture is unknown.
    """
    config = read_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    model: PreTrainedModel = skeleton(config, config._name_or_path or config.model_type, auto_class)
    return model.requires_grad_(False).eval()


def read_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a model; its ``_name_or_path`` is the model's public name."""
    shipped = CONFIGS / f"{name.replace('/', '--')}.json"
    try:
        if exists(shipped) and not exists(Path(name)):
            config, public_name = AutoConfig.from_pretrained(shipped), name
        else:
            source = find_source(name)
            gguf = {"gguf_file": source.path.name} if source.kind == "gguf" else {}
            place = source.path.parent if gguf else source.path
            config = AutoConfig.from_pretrained(place, trust_remote_code=False, **gguf)
            public_name = source.name
    except Exception as error:  # values of wrong types raise many kinds of errors
        if isinstance(error, BaseModelError):
            raise
        raise BaseModelError(
            f"the configuration of {name} cannot be read: {error}", "check its config.json, or update transformers"
        ) from error
    config._name_or_path = public_name
    return config
