"""Status of a model's adapters, layer by layer and as a whole, with the fields of PEFT's functions of these names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.quant.protocol import is_rounded

Irregular = Literal["irregular"]


@dataclass
class LayerStatus:
    """Status of a layer with adapters; adapters by name.

    Attributes:
        name: Name of the layer in the model.
        module_type: Its type, such as ``lora.Linear``.
        enabled: Whether its adapters act at all.
        active_adapters: Adapters that act.
        merged_adapters: Adapters that the base's weight holds.
        requires_grad: Whether each adapter is trained; ``"irregular"`` if only some of its parameters are.
        available_adapters: Adapters of the layer.
        devices: Types of the devices of each adapter's parameters.
        quantization_backend: The format of a quantized base; None for a plain one.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class ModelStatus:
    """Status of a model's adapters; ``"irregular"`` where its layers differ.

    Attributes:
        base_model_type: Class of the base.
        adapter_model_type: ``LoraModel``; ``"None"`` if the adapters were injected without its verbs.
        peft_types: Method of each adapter.
        trainable_params: Number of trainable parameters.
        total_params: Number of parameters.
        num_adapter_layers: Number of layers with adapters.
        enabled: As in :class:`LayerStatus`; so the following.
        active_adapters: See there.
        merged_adapters: See there.
        requires_grad: See there.
        available_adapters: See there.
        devices: See there.
        quantization_backend: See there.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def layer_status(model: nn.Module) -> list[LayerStatus]:
    """Return the status of each layer with adapters.

    Raises:
        ValueError: the model has none.
    """
    found = [
        _status(name, part)
        for name, part in model.named_modules()
        if isinstance(part, (LoraLayer, SavedModule)) and part.available_adapters()
    ]
    if not found:
        raise ValueError("No adapter layers found in the model: it has no adapter")
    return found


def _status(name: str, part: Any) -> LayerStatus:
    names = part.available_adapters()
    parameters = {adapter: part.parts(adapter) for adapter in names}
    return LayerStatus(
        name=name,
        module_type=part._get_name(),
        enabled=part.switch.enabled,
        active_adapters=list(part.switch.active),
        merged_adapters=list(getattr(part, "merged_adapters", ())),
        requires_grad={adapter: _all_or_none(p.requires_grad for p in own) for adapter, own in parameters.items()},
        available_adapters=names,
        devices={adapter: sorted({p.device.type for p in own}) for adapter, own in parameters.items()},
        quantization_backend=_backend(getattr(part, "base_layer", None)),
    )


def _backend(base: Any) -> str | None:
    return type(base).__name__ if isinstance(base, nn.Module) and is_rounded(base) else None


def model_status(model: Any) -> ModelStatus:
    """Return the status of the model's adapters as a whole.

    Raises:
        ValueError: the model has none.
    """
    layers = layer_status(model)
    config: Mapping[str, Any] = getattr(model, "peft_config", {}) if hasattr(model, "lora_parts") else {}
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(merged & set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers)
    return ModelStatus(
        base_model_type=type(model).__name__,
        adapter_model_type="LoraModel" if config else "None",
        peft_types={name: str(settings.peft_type) for name, settings in config.items()},
        trainable_params=sum(number for number, trains in counts if trains),
        total_params=sum(number for number, _ in counts),
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers),
        active_adapters=_same(layer.active_adapters for layer in layers),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={k: _all_or_none(v) for k, v in _by_adapter(layer.requires_grad for layer in layers).items()},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            k: sorted({device for devices in v for device in devices})
            for k, v in _by_adapter(layer.devices for layer in layers).items()
        },
        quantization_backend=_same(layer.quantization_backend for layer in layers),
    )


def _by_adapter(tables: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    joined: dict[str, list[Any]] = defaultdict(list)
    for table in tables:
        for adapter, value in table.items():
            joined[adapter].append(value)
    return dict(joined)


def _all_or_none(values: Iterable[Any]) -> bool | Irregular:
    seen = list(values)
    if all(value is True for value in seen):
        return True
    return "irregular" if any(value is not False for value in seen) else False


def _same(values: Iterable[Any]) -> Any:
    first, *others = values
    return first if all(other == first for other in others) else "irregular"
