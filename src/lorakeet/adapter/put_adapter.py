"""Put an adapter's settings and tensors on a model: beside the others, or in place of the one of its name.

An adapter is replaced whole. The parts of the old one go, so nothing of two adapters is mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakeet.adapter.tensor_checks import check_ranks
from lorakeet.adapter.tensor_loading import load_tensors
from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.lifecycle.merged import merged_names, take_apart, unmerged
from lorakeet.lora.lifecycle.rollback import all_or_nothing
from lorakeet.lora.model import LoraModel

#: Keys of the settings that say where an adapter comes from, and change no layer.
_ORIGIN = ("inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type")


def put_adapter(
    model: LoraModel,
    adapter: str,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    name: str | Path,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    **loading: Any,
) -> None:
    """Put an adapter on the base's own weights, all or nothing; it trains if asked to, or if its predecessor did.

    Args:
        model: A model with or without other adapters.
        adapter: The name to give it there.
        config: Its settings.
        tensors: The tensors of its file.
        name: Folder or hub id, for messages.
        is_trainable: Whether to continue its training.
        autocast_adapter_dtype: Keep a new adapter in fp32 where the base is in half precision.
        **loading: Faults to accept, and what else the notes say; see :func:`load_tensors`.

    Raises:
        AdapterError: As :func:`load_tensors`.
        TargetError: The adapter's layers are not in this model.
    """
    check_ranks(config, tensors, name)
    learning = is_trainable or (adapter in model.peft_config and model.trains(adapter))
    with all_or_nothing(model):
        if adapter in merged_names(model):
            take_apart(model, f"another adapter is loaded as {adapter!r}")
        with unmerged(model):
            if adapter not in model.peft_config:
                config.inference_mode = not learning  # as in PEFT, the model keeps the object
                model.add_adapter(adapter, config, strict=False, autocast_adapter_dtype=autocast_adapter_dtype)
                load_tensors(model, adapter, tensors, name, **loading)
                model.set_requires_grad(adapter, learning)
                return
            config = config.model_copy(update={"inference_mode": not learning})
            if _settings(model.peft_config[adapter]) == _settings(config):
                load_tensors(model, adapter, tensors, name, **loading)
                origin = {key: getattr(config, key) for key in _ORIGIN}
                model.peft_config[adapter] = model.peft_config[adapter].model_copy(update=origin)
            else:
                before = _parameters(model, adapter)
                _renew(model, adapter, config, autocast_adapter_dtype)
                load_tensors(model, adapter, tensors, name, **loading)
                _keep_parameters(model, adapter, before)
            model.set_requires_grad(adapter, learning)


def _settings(config: PeftConfig) -> dict[str, Any]:
    """Return the settings that layers are made of; the order in lists does not matter."""
    values = {key: value for key, value in config.to_dict().items() if key not in _ORIGIN}
    return {key: sorted(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}


def _parameters(model: LoraModel, adapter: str) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by their names in the model; a shared one has several."""
    own = {id(parameter) for parameter in model.adapter_parameters(adapter)}
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}


def _renew(model: LoraModel, adapter: str, config: PeftConfig, autocast_adapter_dtype: bool) -> None:
    """Remove the adapter's parts and add it with other settings, at its place among the others; it has no weights yet."""
    order = list(model.peft_config)
    model.remove_parts(adapter)
    del model.peft_config[adapter]
    model.add_adapter(adapter, config, strict=False, autocast_adapter_dtype=autocast_adapter_dtype)
    for name in order[order.index(adapter) + 1 :]:
        model.peft_config[name] = model.peft_config.pop(name)


def _keep_parameters(model: LoraModel, adapter: str, before: Mapping[str, nn.Parameter]) -> None:
    """Put the new values into the old parameters where the shapes allow it, since an optimizer may hold them."""
    kept = dict(_pairs(before, _parameters(model, adapter)))
    for name, (old, new) in kept.items():
        path, _, leaf = name.rpartition(".")
        old.data, old.grad = new.data, None
        model.get_submodule(path)._parameters[leaf] = old
    if any(parameter.requires_grad for name, parameter in before.items() if name not in kept):
        warn(
            f"adapter {adapter!r} has other layers or ranks than before: an optimizer of the old ones trains nothing now"
        )


def _pairs(
    before: Mapping[str, nn.Parameter], now: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Yield the name, the old and the new parameter of each pair that can be one; none takes part in two pairs."""
    new_of: dict[int, nn.Parameter] = {}
    old_of: dict[int, nn.Parameter] = {}
    for name, new in now.items():
        old = before.get(name)
        if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            continue
        if new_of.setdefault(id(old), new) is new and old_of.setdefault(id(new), old) is old:
            yield name, (old, new)
