"""EVA on a model: the directions of its layers' inputs on data, and an adapter that begins with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet.errors import AdapterError
from lorakeet.eval_mode import evaluating
from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.default_targets import resolve_config
from lorakeet.lora.initialization.eva import input_directions
from lorakeet.lora.inject import plan_injection
from lorakeet.lora.lifecycle.rollback import all_or_nothing
from lorakeet.lora.linear import LoraLinear
from lorakeet.lora.model import LoraModel
from lorakeet.lora.targeting import target_of

#: Beginning of the names of layers in PEFT's models, which wrap the base.
_PREFIX = "base_model.model."


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run the model on a batch that is a dictionary."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: PeftConfig) -> Tensor:
    """Return the indices [n, 2] of the tokens that count: no padding, and with a label if the settings say so."""
    if not isinstance(model_input, Mapping):
        raise TypeError(f"a batch is a {type(model_input).__name__}, expected a dictionary of tensors")
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    mask = mask.bool()
    eva = peft_config.eva_config
    if eva.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != eva.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Return the inputs [n, in] of a layer at the indices of the tokens that count."""
    x = _tensor_of(layer_input, layer_name)
    return x[tuple(model_input.T)]


def _all_inputs(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    return _tensor_of(layer_input, layer_name).flatten(0, -2)


def _tensor_of(layer_input: Any, layer_name: str) -> Tensor:
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(x, Tensor):
        raise TypeError(f"the input of {layer_name} is a {type(x).__name__}, expected a tensor")
    return x


def get_eva_state_dict(
    model: Any,
    dataloader: Iterable[Any],
    peft_config: PeftConfig | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., Tensor]
    | Mapping[str, Any]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return A of each linear layer, from the inputs that a dataloader gives it.

    Args:
        model: A model with the adapter, or a base.
        dataloader: Batches; they are run again from the beginning until the directions have converged.
        peft_config: The settings; needed for a base.
        forward_fn: Function that runs the model on a batch.
        prepare_model_inputs_fn: Function of a batch and the settings: what ``prepare_layer_inputs_fn`` gets of it. None: the
            batch itself.
        prepare_layer_inputs_fn: Function of a layer's input, of that, and of the layer's name: the inputs [n, in] that
            count. Or such functions by layer. None: all inputs.
        adapter_name: The adapter.
        gather_distributed_inputs: Whether to use the inputs of all processes.
        show_progress_bar: Accepted for code written for PEFT, without effect.
    """
    adapted = isinstance(model, LoraModel)
    if peft_config is None and not adapted:
        raise AdapterError("this model has no adapter, expected one, or settings", "give peft_config=LoraConfig(...)")
    config: Any = peft_config or model.peft_config[adapter_name]
    layers = _adapted_layers(model, adapter_name) if adapted else _planned_layers(model, config)
    own = dict(prepare_layer_inputs_fn) if isinstance(prepare_layer_inputs_fn, Mapping) else {}
    if unknown := sorted(own.keys() - layers.keys()):
        raise AdapterError(
            f"prepare_layer_inputs_fn names {unknown[0]!r}, which is no adapted layer", "name layers in full"
        )
    everywhere = _all_inputs if own or prepare_layer_inputs_fn is None else prepare_layer_inputs_fn

    def prepare(batch: Any, name: str, args: Any) -> Tensor:
        seen = prepare_model_inputs_fn(batch, config) if prepare_model_inputs_fn else batch
        x = own.get(name, everywhere)(args, seen, name)
        return _gathered(x) if gather_distributed_inputs else x

    ranks = {name: target_of(name, config).r for name in layers}
    batches = _OnDevice(dataloader, next(model.parameters()).device)
    with evaluating(model), model.disable_adapter() if adapted else nullcontext():
        return input_directions(
            layers, ranks, batches, lambda batch: forward_fn(model, batch), prepare, config.eva_config
        )


def _adapted_layers(model: Any, adapter: str) -> dict[str, nn.Module]:
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear) and adapter in layer.r
    }


def _planned_layers(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    targets = plan_injection(model, resolve_config(model, config)).targets
    found = {target.name: model.get_submodule(target.name) for target in targets if not target.parameter}
    return {name: layer for name, layer in found.items() if isinstance(layer, (nn.Linear, Conv1D))}


class _OnDevice:
    """Batches of a dataloader on a device; each iteration begins again."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Any:
        return (_moved(batch, self.device) for batch in self.batches)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(inner, device) for inner in value)
    return value.to(device) if hasattr(value, "to") else value


def _gathered(x: Tensor) -> Tensor:
    """Return the inputs of all processes, one after the other."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return x
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, x.cpu())
    return torch.cat(parts).to(x.device)


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., Tensor]
    | Mapping[str, Any]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Let an adapter with ``init_lora_weights="eva"`` begin with the directions of its layers' inputs; shares the ranks out.

    Args:
        model: A model with the adapter, which is the only active one.
        dataloader: As in :func:`get_eva_state_dict`; and so the other arguments.
        eva_state_dict: A of each layer, instead of batches.
        forward_fn: See there.
        prepare_model_inputs_fn: See there.
        prepare_layer_inputs_fn: See there.
        adapter_name: The adapter.
        gather_distributed_inputs: See there.
        show_progress_bar: See there.

    Raises:
        AdapterError: The model has no such adapter, or several active ones, or there are neither batches nor directions.
    """
    if not isinstance(model, LoraModel):
        raise AdapterError("this model has no adapter, so EVA has nothing to initialize", "get_peft_model first")
    if len(model.active_adapters) > 1:
        raise AdapterError(
            f"{len(model.active_adapters)} adapters are active, expected a single active adapter",
            "set_adapter(name) first",
        )
    config: Any = model.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise AdapterError(
            f"adapter {adapter_name!r} has init_lora_weights={config.init_lora_weights!r}, expected 'eva'",
            "LoraConfig(init_lora_weights='eva')",
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise AdapterError("there is no dataloader and no eva_state_dict", "give one of them")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    directions = {name.removeprefix(_PREFIX): a for name, a in eva_state_dict.items()}
    begin_with(model, adapter_name, directions)


def begin_with(model: LoraModel, adapter: str, directions: Mapping[str, Tensor]) -> None:
    """Give each layer of an adapter its A and the rank of that; layers with rank 0 lose the adapter.

    Args:
        model: A model with the adapter.
        adapter: The adapter; it keeps its settings' object, with the ranks and α of single layers filled in.
        directions: A [rank, in], by layer.
    """
    config: Any = model.peft_config[adapter]
    named = {name: layer for name, layer in model.named_modules() if adapter in getattr(layer, "r", ())}
    if missing := [name for name in named if name not in directions]:
        warn(f"{len(missing)} layers begin as usual, since EVA has no directions for them: {', '.join(missing[:5])}")
    ranks, alphas = {}, {}
    for name in named:
        target, a = target_of(name, config), directions.get(name)
        ranks[name] = target.r if a is None else len(a)
        alphas[name] = target.alpha * (ranks[name] / target.r if config.eva_config.adjust_scaling_factors else 1)
    active, trains, order = list(model.active_adapters), model.trains(adapter), list(model.peft_config)
    with all_or_nothing(model):
        model.remove_parts(adapter)
        del model.peft_config[adapter]
        config.target_modules = [name for name in named if ranks[name]]
        config.rank_pattern = {name: r for name, r in ranks.items() if r and r != config.r}
        config.alpha_pattern = {
            name: alphas[name] for name in config.target_modules if alphas[name] != config.lora_alpha
        }
        model.add_adapter(adapter, config, strict=False)
        for name in order[order.index(adapter) + 1 :]:
            model.peft_config[name] = model.peft_config.pop(name)
        for name in config.target_modules:
            if name in directions:
                layer: Any = model.get_submodule(name)
                layer.pair(adapter)[0].weight.copy_(directions[name])
        model.set_adapter(active, inference_mode=not trains)
