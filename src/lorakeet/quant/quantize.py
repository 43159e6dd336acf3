"""Quantize a model that is in memory to 8 bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from lorakeet.quant.hf_quantizer import (
    METHOD,
    Int8Config,
    Int8Quantizer,
    foreign_method,
    foreign_method_error,
    not_finite_error,
)
from lorakeet.quant.int8 import INT8
from lorakeet.quant.layer_selection import layers_to_quantize
from lorakeet.quant.protocol import is_quantized
from lorakeet.quant.replace import replace_layers_, tie_tensors


@torch.no_grad()
def quantize_(model: PreTrainedModel, keep: Iterable[str] = (), embeddings: bool = True) -> int:
    """Quantize a model in memory to 8 bits, in place and layer by layer.

    Trainable weights, a task's head outside of the base model, and the modules that ``keep`` names stay as they are.

    Returns:
        The number of quantized layers.

    Raises:
        BaseModelError: a weight has NaN or infinite values, or another method has quantized the model already.
    """
    if other := foreign_method(getattr(model.config, "quantization_config", None)):
        raise foreign_method_error("this base", other)
    config = Int8Config(embeddings, keep)
    chosen = {
        name: layer
        for name, layer in layers_to_quantize(model, embeddings, config.modules_to_not_convert).items()
        if not layer.weight.requires_grad and not is_quantized(layer)  # type: ignore[operator]
    }
    broken = [name for name, layer in chosen.items() if not torch.isfinite(layer.weight).all()]  # type: ignore[arg-type]
    if broken:
        raise not_finite_error(broken)
    replace_layers_(model, chosen, INT8)
    if chosen:
        model.hf_quantizer = quantizer = Int8Quantizer(config, pre_quantized=False)
        quantizer.postprocess_model(model)
        model.is_quantized, model.quantization_method = True, METHOD
        tie_tensors(model, chosen)
    return len(chosen)
