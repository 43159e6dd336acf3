"""Outputs of a model or of its layers on a fixed batch, to compare merged with unmerged.

In fp32 and fp64 the whole model runs. In half precision its activations are rounded by as much as a small adapter changes
them. There each layer runs on its own, widened to fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorakeet.facts.padding import padding_token
from lorakeet.facts.vocabulary import embedding_rows
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.target_parameters import LoraParameter
from lorakeet.quant.protocol import is_quantized, is_rounded, weight_dtype

#: Share of the largest output. Rounding error of the outputs of a whole model, by the number format that it computes in:
#: about 100 times the format's own, for its many sums. In other formats outputs are reported but not judged.
OUTPUT_NOISE = {torch.float64: 1e-12, torch.float32: 5e-5}


class Probe:
    """A fixed batch: outputs of the whole model if it reads token ids, else of each layer on its own.

    Attributes:
        noise: Share of the largest output that the outputs' own rounding makes; None: they are not precise enough to judge.
    """

    def __init__(self, model: Any, layers: Sequence[LoraLayer], given: dict[str, Tensor] | None) -> None:
        self.model, self.layers = model, layers
        narrow = [layer for layer in layers if _noise(layer) is None]
        self.noise = None if narrow else max(map(_noise, layers), default=0.0)  # type: ignore[type-var]
        self.inputs = given if given is not None else token_probe(model)
        self.whole = self.inputs is not None and (self.noise is not None or given is not None)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Compute the outputs, in fp32 or wider."""
        if self.inputs is not None and self.whole:
            return [_widened(_first_tensor(self.model(**self.inputs)))]
        return [output for layer in self.layers if (output := _layer_output(layer)) is not None]


def _noise(layer: LoraLayer) -> float | None:
    return None if is_rounded(layer.base_layer) else OUTPUT_NOISE.get(weight_dtype(layer.base_layer))


def _widened(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _layer_output(layer: LoraLayer) -> Tensor | None:
    """Return a layer's output on its own probe, computed in fp32 or wider; None for experts in half precision."""
    x = layer.probe()
    half = {key: p.float() for key, p in layer.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    if isinstance(layer, LoraParameter) and weight_dtype(layer.base_layer) in (torch.bfloat16, torch.float16):
        return None  # its weight belongs to another module; all of it is measured in merge_loss
    if not half or is_quantized(layer.base_layer):
        return _widened(layer(x))
    output: Tensor = torch.func.functional_call(layer, half, (x.float() if x.is_floating_point() else x,))
    return _widened(output)


def token_probe(model: Any) -> dict[str, Tensor] | None:
    """Build two rows of 16 fixed pseudo-random token ids, for a model that reads ``input_ids``; else None.

    One row where no padding token is known: some classifiers refuse two rows without one. For an encoder-decoder each row
    ends with the only end token in it, the position that BART's and T5's classifiers use.
    """
    config = getattr(model, "config", None)
    vocabulary = embedding_rows(model)
    if not vocabulary or getattr(model, "main_input_name", None) != "input_ids":
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, 16), generator=generator).to(model.get_input_embeddings().weight.device)
    ids = ids if padding_token(config) is not None else ids[:1]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and getattr(config, "is_encoder_decoder", False):
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**both, "decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else both


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output[0]


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the largest absolute difference between outputs; NaN if one of them is."""
    differences = torch.tensor([float((x - y).abs().max()) for x, y in zip(a, b, strict=True)])
    return float(differences.max()) if len(differences) else 0.0
