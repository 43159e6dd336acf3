"""Parts of a model that the compiled loops read: decoder layers, norm, head and rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.inference.fast_decode import KNOWN, is_known_layer
from lorakeet.kernels import paged
from lorakeet.kernels.cpu import bindings, gemm
from lorakeet.kernels.decoder_step import Layer, LinearWeights, Norm
from lorakeet.kernels.int8.format import outlier_columns, split_scale
from lorakeet.kernels.paged import PagedLayers, UpdateTable
from lorakeet.lora.layer import LoraLayer
from lorakeet.quant.protocol import is_hooked, is_quantized

#: Linear layers of a decoder layer, in the order of the compiled loops.
LINEARS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)
#: Kinds of rotary positions whose angles depend on the position alone.
_ROTARY = ("default", "linear", "llama3", "yarn")
#: Positions for which angles are computed at a time.
_ANGLES = 2048


class UnsupportedError(ValueError):
    """A part of a model that the compiled loops do not know."""


class Angles:
    """Cosines and sines of rotary positions, computed in fixed blocks, so that a position's have the same bits always."""

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self._blocks: list[Tensor] = []  # [2, _ANGLES, dim] each

    def __call__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, fp32 [n, dim] each."""
        while len(self._blocks) * _ANGLES <= max(positions, default=-1):
            first = len(self._blocks) * _ANGLES
            given = torch.arange(first, first + _ANGLES).unsqueeze(0)
            self._blocks.append(torch.cat(self._rotary(torch.empty(0, dtype=torch.float32), given)))
        if max(positions, default=-1) < _ANGLES and self._blocks:
            cosine, sine = self._blocks[0][:, list(positions)]
            return cosine, sine
        chosen = [self._blocks[position // _ANGLES][:, position % _ANGLES] for position in positions]
        cosine, sine = torch.stack(chosen, 1) if chosen else torch.empty(2, 0, 0)
        return cosine, sine


@dataclass(frozen=True)
class Parts:
    """Parts of a model, for rows of tokens.

    Attributes:
        embedding: Function of ids [n] that returns fp32 [n, hidden].
        layers: The decoder layers.
        norm: The norm after them.
        head: The LM head, int8 [vocabulary, hidden].
        angles: Rotary positions.
        no_updates: Table of a row without an adapter.
    """

    embedding: Any
    layers: PagedLayers
    norm: Norm
    head: LinearWeights
    angles: Angles
    no_updates: UpdateTable

    def logits(self, h: Tensor) -> Tensor:
        """Compute logits, fp32 [n, vocabulary], from the layers' output [n, hidden]."""
        if not len(h):
            return h.new_empty(0, len(self.head.weight))
        normed, _ = bindings.rms_norm(h, self.norm.weight, self.norm.eps, 0.0)
        row_scale, column_scale = split_scale(self.head.weight, self.head.scale)
        return gemm.gemv_w8a16(normed, self.head.weight, row_scale, column_scale, self.head.bias)


def read_parts(model: Any) -> Parts:
    """Read the parts of a model, which stay its own: nothing is copied.

    Args:
        model: A causal model, with or without adapters.

    Raises:
        UnsupportedError: The compiled loops do not know a part.
    """
    kind: Any = type(model)
    inner: Any = model._modules.get("model")
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in {
        f"{one}ForCausalLM" for one in KNOWN
    }:
        raise UnsupportedError(f"{kind.__name__} is not one of {', '.join(KNOWN)}")
    if not paged.is_available():
        raise UnsupportedError("this machine has no compiled loops")
    layers, rotary = list(inner.layers), inner.rotary_emb
    if not layers or not all(map(is_known_layer, layers)):
        raise UnsupportedError("its decoder layers are others")
    if rotary.rope_type not in _ROTARY:
        raise UnsupportedError(f"its rotary positions are of kind {rotary.rope_type}")
    try:
        read = PagedLayers([_layer(layer) for layer in layers])
    except ValueError as error:
        raise UnsupportedError(str(error)) from error
    embedding, head = _base(inner.embed_tokens), _linear(_base(model.lm_head))
    if outlier_columns(head.weight, head.scale) is not None or head.packed:
        raise UnsupportedError("its head is not a vocabulary in 8 bits")
    if is_hooked(embedding) or embedding(torch.zeros(1, dtype=torch.long)).dtype != torch.float32:
        raise UnsupportedError("it does not compute in fp32")
    norm = Norm(inner.norm.weight.detach(), inner.norm.variance_epsilon)
    return Parts(embedding, read, norm, head, Angles(rotary), UpdateTable([]))


def _layer(layer: Any) -> Layer:
    attention = layer.self_attn
    if getattr(attention, "sliding_window", None) is not None:
        raise UnsupportedError("its layers have a sliding window")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    inside = [layer, attention, layer.mlp, *(norm for norm in norms if norm is not None)]
    if any(map(is_hooked, inside)):
        raise UnsupportedError("its layers have hooks")
    given = [None if norm is None else Norm(norm.weight.detach(), norm.variance_epsilon) for norm in norms]
    linears = [_linear(_base(layer.get_submodule(name))) for name in LINEARS]
    return Layer(linears, given, attention.head_dim, attention.scaling)


def _base(module: Any) -> Any:
    """Return the layer below the adapters."""
    return module.base_layer if isinstance(module, LoraLayer) else module


def _linear(module: Any) -> LinearWeights:
    weights = module.decoder_weights() if is_quantized(module) and not is_hooked(module) else None
    if weights is None:
        raise UnsupportedError(f"{type(module).__name__} is not a linear layer in 8 bits")
    return weights
