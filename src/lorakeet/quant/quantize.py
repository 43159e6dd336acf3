"""Quantize a model that is in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from lorakeet.quant.half import widen_
from lorakeet.quant.hf_quantizer import (
    CONFIGS,
    FORMATS,
    QUANTIZERS,
    foreign_method,
    foreign_method_error,
    not_finite_error,
)
from lorakeet.quant.layer_selection import layers_to_quantize
from lorakeet.quant.protocol import is_quantized
from lorakeet.quant.replace import replace_layers_, tie_tensors


@torch.no_grad()
def quantize_(model: PreTrainedModel, keep: Iterable[str] = (), embeddings: bool = True, form: str = "int8") -> int:
    """Quantize a model in memory, in place and layer by layer.

    Trainable weights, a task's head outside of the base model, and the modules that ``keep`` names stay as they are.

    Args:
        model: Has its weights in memory.
        keep: Modules to leave alone, named as seen from inside the base model.
        embeddings: Quantize the input embedding and the head of a language model too.
        form: Name of the format, ``int8`` or ``nf4``.

    Returns:
        The number of quantized layers.

    Raises:
        BaseModelError: a weight has NaN or infinite values, or another method has quantized the model already.
    """
    if other := foreign_method(getattr(model.config, "quantization_config", None)):
        raise foreign_method_error("this base", other)
    config: Any = CONFIGS[form](embeddings, keep)
    widen_(model)
    chosen = {
        name: layer
        for name, layer in layers_to_quantize(model, embeddings, config.modules_to_not_convert).items()
        if not layer.weight.requires_grad and not is_quantized(layer)  # type: ignore[operator]
    }
    broken = [name for name, layer in chosen.items() if not torch.isfinite(layer.weight).all()]  # type: ignore[arg-type]
    if broken:
        raise not_finite_error(broken)
    replace_layers_(model, chosen, FORMATS[form])
    if chosen:
        model.hf_quantizer = quantizer = QUANTIZERS[form](config, pre_quantized=False)
        quantizer.postprocess_model(model)
        model.is_quantized, model.quantization_method = True, config.quant_method
        tie_tensors(model, chosen)
    return len(chosen)
