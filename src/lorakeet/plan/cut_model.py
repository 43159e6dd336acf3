"""The model of a run, cut to a few layers: each kind of layer, its adapter and its patches, with weights that mean nothing.

The whole model is built on the meta device, quantized and adapted as the run does it. One layer of each kind gets memory.
From a pass of these few layers follows the cost of a pass of all (:mod:`lorakeet.plan.pass_cost`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.base.architectures import AUTO_CLASSES, own_class
from lorakeet.base.checkpoint_files import weight_files
from lorakeet.base.config_checks import skeleton
from lorakeet.base.device_dtype import choose_device, choose_dtype, keeps_halves
from lorakeet.base.load import Base, ModelInfo
from lorakeet.base.source import find_source, local_folder
from lorakeet.config import QUANTIZED_FORMATS, BaseSettings, RunConfig
from lorakeet.errors import BaseModelError
from lorakeet.log import silent
from lorakeet.patches.gradient_checkpointing import checkpointable_layers
from lorakeet.plan.pass_cost import Part
from lorakeet.quant.half_loading import half_layers, put_halves_, stored_names
from lorakeet.quant.hf_quantizer import FORMATS, own_bits, reads_layout
from lorakeet.quant.layer_selection import layers_to_quantize
from lorakeet.quant.protocol import QuantizedWeight
from lorakeet.quant.replace import QuantizedFormat, replace_layers_, tie_tensors
from lorakeet.rng import same_random_state
from lorakeet.tasks.setup import adapter_config
from lorakeet.tasks.task import Task

#: Bytes up to which weights are drawn at random. Larger ones are pages of zeros, which take no memory.
RANDOM_BYTES = 1 << 30
#: Attributes in which layers of the same shapes differ: the kind of their attention.
_KINDS = ("attention_type", "layer_type", "is_sliding", "sliding_window", "is_moe", "is_decoder")


def whole_model(config: RunConfig, found: ModelInfo, task: Task) -> PeftModel:
    """Build the model that a run trains on the meta device: base in its number format, head, adapter.

    Args:
        config: Settings of the run.
        found: Configuration and tokenizer of the base.
        task: The run's task.
    """
    device = choose_device(config.base.device)
    with silent(), same_random_state():
        dtype = choose_dtype(config.base, device)
        settings = copy.deepcopy(found.config)
        for name, value in task.model_options().items():
            setattr(settings, name, value)
        stored = getattr(settings, "quantization_config", None)
        foreign = reads_layout(stored)  # of bitsandbytes, which leaves the vocabulary alone
        bits = 4 if foreign else own_bits(stored) or config.base.bits
        trust = config.base.trust_remote_code
        model = skeleton(settings, found.name, AUTO_CLASSES[task.name], trust, dtype=dtype)
        model.requires_grad_(False).eval()
        fresh = _fresh(model)
        if bits in QUANTIZED_FORMATS:
            _quantize(model, fresh, FORMATS[QUANTIZED_FORMATS[bits]], not foreign)
        elif stored is None:
            _keep_halves(model, config.base, device)
        base = Base(model, found.tokenizer, found.name, dtype, device, fresh)
        return get_peft_model(model, adapter_config(config, base, task))


def _quantize(model: PreTrainedModel, fresh: Sequence[str], form: QuantizedFormat, embeddings: bool) -> None:
    """Put placeholders of quantized layers in place of those that loading would quantize."""

    def placeholder(dense: Tensor, vocabulary: bool) -> QuantizedWeight:
        rows, columns = dense.shape
        return form.placeholder((rows, columns), vocabulary)

    found = layers_to_quantize(model, embeddings)
    chosen = {name: layer for name, layer in found.items() if f"{name}.weight" not in fresh}
    replace_layers_(model, chosen, QuantizedFormat(placeholder, form.layer, form.placeholder))
    tie_tensors(model, chosen)


def _keep_halves(model: PreTrainedModel, settings: BaseSettings, device: torch.device) -> None:
    """Put layers in 16 bits in place of those whose weights loading would leave so."""
    try:
        folder = local_folder(find_source(settings.model, settings.revision), settings.trust_remote_code)
    except BaseModelError:  # a configuration without a model
        return
    if keeps_halves(settings, device, folder):
        put_halves_(model, half_layers(model, stored_names(model, weight_files(folder))))


def _fresh(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the weights that a checkpoint of the base lacks: those of a new head."""
    own, settings = own_class(model.config), copy.deepcopy(model.config)
    if isinstance(model, own):
        return ()
    make = getattr(own, "from_config", None) or own._from_config  # an auto class, or a class of an architecture
    with torch.device("meta"):
        saved = {name for name, _ in make(settings).named_parameters()}
    return tuple(name for name, _ in model.named_parameters() if name not in saved)


# ---- the cut --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CutModel:
    """A model with a few of its layers, and weights.

    Attributes:
        model: The model, in training mode.
        layers: Its layers, in order.
        numbers: Number of each in the whole model.
        standing: For each layer of the whole model, the position in ``layers`` of the one that stands for it.
    """

    model: PeftModel
    layers: tuple[nn.Module, ...]
    numbers: tuple[int, ...]
    standing: tuple[int, ...]

    def whole(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Return the parts of a pass of the whole model, from those of a pass of this one."""
        parts = _with_gaps(parts)
        found = {(part.layer, part.backward): part for part in parts if part.layer is not None}
        made: list[Part] = []
        done = -1
        for part in parts:
            if part.layer is None:
                made.append(part)
                continue
            number = self.numbers[part.layer]
            if part.backward:
                last = len(self.standing) if done < 0 else done
                wanted, done = range(last - 1, number - 1, -1), number
            else:
                wanted, done = range(done + 1, number + 1), number
            made += [_numbered(found.get((self.standing[each], part.backward), part), each) for each in wanted]
            if not part.backward and number == len(self.standing) - 1:
                done = -1
        return tuple(made)


def _with_gaps(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with what lies between two layers as the end of the first one: there its input is freed."""
    made: list[Part] = []
    for index, part in enumerate(parts):
        between = made and part.layer is None and index + 1 < len(parts) and parts[index + 1].layer is not None
        if between and made[-1].layer is not None and made[-1].backward == parts[index + 1].backward:
            made[-1] = made[-1].then(part)
        else:
            made.append(part)
    return made


def _numbered(part: Part, number: int) -> Part:
    return replace(part, layer=number)


def cut(model: PeftModel, device: torch.device, *, every_layer: bool = False) -> CutModel:
    """Keep one layer of each kind of a model on the meta device, the first and last of each stack, and give them weights.

    Args:
        model: The whole model; it is changed.
        device: Where the weights are to be.
        every_layer: Keep all layers.
    """
    layers = checkpointable_layers(model)
    stacks = _stacks(model, layers)
    standing, kept = [0] * len(layers), list[int]()
    reached = any(p.requires_grad for p in _outside(model, layers))
    for stack in stacks:
        first: dict[Any, int] = {}
        for number in stack:
            reached = reached or any(p.requires_grad for p in layers[number].parameters())
            ends = number if every_layer or number in (stack[0], stack[-1]) else None
            kind = first.setdefault((ends, reached, _kind(layers[number])), number)
            if kind == number:
                kept.append(number)
            standing[number] = kind
    position = {number: index for index, number in enumerate(kept)}
    _keep_layers(model, layers, [layers[number] for number in kept])
    give_weights(model, device)
    model.train()
    chosen = tuple(layers[number] for number in kept)
    return CutModel(model, chosen, tuple(kept), tuple(position[number] for number in standing))


def _stacks(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[int]]:
    """Return the numbers of the layers of each stack."""
    number = {id(layer): index for index, layer in enumerate(layers)}
    return [
        [number[id(each)] for each in module]
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(id(each) in number for each in module)
    ]


def _outside(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the parameters of the embedding: a gradient that reaches it passes through every layer."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    yield from embedding.parameters() if embedding is not None else ()


def _kind(layer: nn.Module) -> Any:
    """Return what decides the cost of a layer."""
    shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    kinds = tuple(str(getattr(module, name, None)) for module in layer.modules() for name in _KINDS)
    return type(layer), shapes, kinds


def _keep_layers(model: Any, layers: Sequence[nn.Module], kept: Sequence[nn.Module]) -> None:
    """Leave only some layers in the stacks of a model, and in the lists of its configurations that have an entry for each."""
    wanted, known = {id(layer) for layer in kept}, {id(layer) for layer in layers}
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.ModuleList) or not len(module) or not all(id(each) in known for each in module):
            continue
        stay = [index for index, layer in enumerate(module) if id(layer) in wanted]
        for config in configs.values():
            for key, value in list(vars(config).items()):
                if isinstance(value, list) and len(value) == len(module) and key != "id2label":
                    setattr(config, key, [value[index] for index in stay])
        model.set_submodule(name, nn.ModuleList([module[index] for index in stay]))


def give_weights(model: nn.Module, device: torch.device) -> None:
    """Give every tensor on the meta device memory; tensors that are shared stay shared."""
    sizes = {id(p): p.nbytes for p in model.parameters() if p.is_meta}
    draw = None
    if sum(sizes.values()) <= RANDOM_BYTES:
        draw = torch.Generator(device).manual_seed(0)
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    filled = _filled(parameter, device, draw)
                    made[id(parameter)] = nn.Parameter(filled, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=device)


def _filled(like: Tensor, device: torch.device, draw: torch.Generator | None) -> Tensor:
    """Return a tensor on ``device`` like one on the meta device: random, or zeros in pages that take no memory."""
    if draw is None and device.type == "cpu" and like.dtype != torch.bfloat16:
        dtype = str(like.dtype).removeprefix("torch.")
        return torch.from_numpy(np.zeros(tuple(like.shape), dtype=dtype))
    empty = torch.empty_like(like, device=device)
    if draw is None:
        return empty.zero_()
    return (
        empty.uniform_(-0.05, 0.05, generator=draw)
        if like.is_floating_point()
        else empty.random_(-100 if like.dtype.is_signed else 0, 100, generator=draw)
    )
