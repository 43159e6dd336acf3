"""Loading of a base whose weights stay in the 16 bits in which its files have them, while it computes in fp32.

A layer keeps its 16 bits only where nothing but its own forward reads its weight. Another reader would see the number format
of the storage and compute in it, and outputs would not be those of an fp32 base.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakeet.kernels.half_linear import HALF
from lorakeet.quant.file_names import NamesInModel, floating_formats
from lorakeet.quant.half import half_layer
from lorakeet.quant.layer_selection import layers_to_quantize, vocabulary_layers
from lorakeet.quant.resize_vocabulary import enable_resizing_of_halves

#: Name of the hook of transformers' loader. No ``config.json`` has it: the loaded model is a plain one.
METHOD = "lorakeet_half"
#: Package of the models of transformers. The code of others is unknown.
_MODELS = "transformers.models."


def has_halves(files: Iterable[str | Path]) -> bool:
    """Whether the files of a model have tensors in 16 bits."""
    return any(dtype in HALF for file in files for dtype in floating_formats(Path(file)).values())


def half_layers(model: PreTrainedModel, stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Return the number format of each layer that can keep its weight in 16 bits.

    Args:
        model: An fp32 model, with its weights or on the meta device.
        stored: Number format of the tensors in the files, by their names in the model.
    """
    code = _code(model)
    if not type(model).__module__.startswith(_MODELS) or re.search(r"\bself\.dtype\b", code):
        return {}
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    vocabulary = vocabulary_layers(model)
    found: dict[str, torch.dtype] = {}
    for name, layer in layers_to_quantize(model).items():
        owner = name if f"{name}.weight" in stored else vocabulary.get(name, name)
        dtype = stored.get(f"{owner}.weight")
        plain = type(layer) in (nn.Linear, nn.Embedding) and layer.weight.dtype == torch.float32
        if dtype in HALF and plain and not any(part in name for part in kept) and not _is_read(name, code):
            found[name] = dtype  # type: ignore[assignment]
    tied = {name: [other for other in vocabulary if vocabulary[other] == source] for name, source in vocabulary.items()}
    return {
        name: dtype for name, dtype in found.items() if all(found.get(other) == dtype for other in tied.get(name, ()))
    }


def _is_read(name: str, code: str) -> bool:
    """Whether code reads the weight of a layer itself, by the layer's name in its parent."""
    leaf = re.escape(name.rpartition(".")[2])
    return bool(re.search(rf"\bself\.(?:[\w\[\]]+\.)*{leaf}\.weight\b", code))


def _code(model: nn.Module) -> str:
    """Return the source text of the modules around the layers of a model."""
    around = {kind for module in model.modules() if next(module.children(), None) for kind in type(module).__mro__}
    own = {kind.__module__ for kind in around if kind.__module__.startswith((_MODELS, "torch.nn"))}
    return "\n".join(map(_source, sorted(own - {nn.Module.__module__})))


@cache
def _source(module: str) -> str:
    with suppress(OSError, TypeError):  # no file, or no source in it
        return inspect.getsource(sys.modules[module])
    return ""


def put_halves_(model: PreTrainedModel, chosen: Mapping[str, torch.dtype]) -> None:
    """Put layers in 16 bits, on the meta device, in place of those of a model; tied ones share their weight."""
    weights: dict[int, nn.Parameter] = {}
    for name, dtype in chosen.items():
        dense: Any = model.get_submodule(name)
        empty = torch.empty_like(dense.weight, dtype=dtype, device="meta")
        weight = weights.setdefault(id(dense.weight), nn.Parameter(empty, requires_grad=False))
        model.set_submodule(name, half_layer(dense, weight))


@register_quantization_config(METHOD)
class HalfConfig(QuantizationConfigMixin):
    """Settings that make transformers' loader leave weights in the 16 bits of the files."""

    def __init__(self) -> None:
        self.quant_method: Any = METHOD


@register_quantizer(METHOD)
class HalfLoader(HfQuantizer):
    """Hook of transformers' loader: layers in 16 bits before the weights are read, and a plain model afterwards."""

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **_: Any
    ) -> None:
        put_halves_(model, half_layers(model, stored_names(model, checkpoint_files or ())))

    def postprocess_model(self, model: PreTrainedModel, **_: Any) -> None:
        self.remove_quantization_config(model)
        del model.is_quantized
        enable_resizing_of_halves(model)


def stored_names(model: PreTrainedModel, files: Iterable[str | Path]) -> dict[str, torch.dtype]:
    """Return the number formats of the tensors in files, by the names that the model gives them.

    Tensors that loading makes of others are left out.
    """
    names = NamesInModel(model)
    found = {}
    for file in files:
        for key, dtype in sorted(floating_formats(Path(file)).items()):
            name, converted = names.of(key)
            if not converted:
                found[name] = dtype
    return found
