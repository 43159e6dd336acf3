"""Layers of a base in 8 bits, and which layers of a model become such.

Each weight is kept once, int8 [out, in], with one vector of fp32 numbers: scales for each output channel (for an embedding or
a head: for each token), and for layers inside the model for each input channel too; and a few columns that are not rounded.
Both are plain parameters that ask for no gradient, so that every way of spreading a model over processes carries them. Where
a head shares its weight with the embedding it shares the rounded weight and the scales too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakeet.kernels.decoder_step import LinearWeights
from lorakeet.kernels.int8.linear import (
    dequantize,
    input_gradient,
    int8_linear,
    product,
    quantize_rows,
    quantize_weight,
    rounding_steps,
)
from lorakeet.quant.protocol import QuantizedLayer


class Int8Weight(NamedTuple):
    """A weight in 8 bits: int8 [out, in] and the scales that belong to it (:mod:`lorakeet.kernels.int8.linear`)."""

    weight: Tensor
    scale: Tensor

    @property
    def merge_tolerance(self) -> float | None:
        """None: 8 bits would lose the update."""
        return None

    @property
    def out_features(self) -> int:
        """Output channels, or tokens."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Input channels, or the width of an embedding."""
        return self.weight.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return ``weight`` and ``scale``."""
        return self._asdict()

    def product(self, x: Tensor, bias: Tensor | None = None, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute x·Wᵀ + b + u·vᵀ; see :func:`lorakeet.kernels.int8.linear.product`."""
        return product(x, self.weight, self.scale, bias, low_rank)

    def input_gradient(self, g: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute g·W + u·vᵀ; see :func:`lorakeet.kernels.int8.linear.input_gradient`."""
        return input_gradient(g, self.weight, self.scale, low_rank)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values [out, in]."""
        return dequantize(self.weight, self.scale, dtype)

    def requantize(self, weight: Tensor) -> Int8Weight:
        """Quantize another weight of this shape, with as many scales."""
        return Int8Weight(*round_weight(weight, vocabulary=len(self.scale) == len(self.weight)))

    def is_rounding_of(self, weight: Tensor) -> bool:
        """Whether each value is at most half a rounding step away."""
        error = (self.dequantize() - weight.float()).abs()
        return bool((error <= 0.51 * rounding_steps(self.weight, self.scale)).all())

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows [..., in]."""
        return dequantize(self.weight, self.scale, dtype, ids.flatten()).unflatten(0, ids.shape)


class _Int8Layer(QuantizedLayer):
    """The parameters ``weight`` and ``scale`` that both kinds of 8-bit layers have."""

    scale: nn.Parameter

    def quantized_weight(self, tensors: Mapping[str, Tensor] | None = None) -> Int8Weight:
        given: Any = self._parameters if tensors is None else tensors
        return Int8Weight(given["weight"], given["scale"])


class Int8Linear(_Int8Layer):
    """A frozen linear layer whose weight is int8 [out, in], also where the original stored it the other way round.

    Attributes:
        weight: int8 [out, in].
        scale: fp32, what belongs to the weight's bytes: see :mod:`lorakeet.kernels.int8.linear`.
        bias: [out] in the base's dtype, or None.
        transposed: whether the original stored its weight as [in, out].
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.transposed, self.dtype = transposed, dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias)

    def decoder_weights(self) -> LinearWeights | None:
        own = self._parameters  # nn.Module's attribute look-up is slow, and this is asked for every layer and token
        return LinearWeights(own["weight"], own["scale"], own.get("bias"))  # type: ignore[arg-type]

    def dequantized(self) -> nn.Module:
        weight = dequantize(self.weight, self.scale, self.dtype)
        made: Any = plain_layer(self)
        made.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(_Int8Layer, nn.Embedding):
    """A frozen embedding whose weight is int8 [vocabulary, dim], with one scale for each token."""

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)  # an embedding's own would make another weight
        if scale.shape != weight.shape[:1]:
            raise ValueError(
                f"an embedding of {len(weight)} tokens with {len(scale)} scales, expected one for each token"
            )
        self.dtype = dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input)

    def rows(self, ids: Tensor) -> Tensor:
        """The vectors of tokens: [...] -> [..., dim] in the base's dtype."""
        rows = F.embedding(ids, self.weight).float()
        return rows.mul_(F.embedding(ids, self.scale.unsqueeze(1))).to(self.dtype)

    def dequantized(self) -> nn.Module:
        return nn.Embedding.from_pretrained(dequantize(self.weight, self.scale, self.dtype), freeze=False)


def round_weight(weight: Tensor, transposed: bool = False, vocabulary: bool = False) -> tuple[Tensor, Tensor]:
    """A weight as the base's files have it, [out, in] or [in, out] -> int8 [out, in] and what belongs to it, fp32.

    Of an embedding or a head, whose rows are tokens and may be added to: one scale for each, fp32 [out].
    """
    weight = weight.T.contiguous() if transposed else weight
    return quantize_rows(weight) if vocabulary else quantize_weight(weight)


def plain_layer(layer: Int8Linear | Int8Embedding) -> nn.Module:
    """The plain layer in whose place ``layer`` stands, with values of no meaning."""
    place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.dtype}
    if isinstance(layer, Int8Embedding):
        return nn.utils.skip_init(nn.Embedding, layer.num_embeddings, layer.embedding_dim, **place)
    if layer.transposed:
        return Conv1D(layer.out_features, layer.in_features).to(**place)
    return nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, layer.bias is not None, **place)


def int8_layers(model: nn.Module) -> Iterator[tuple[str, Int8Linear | Int8Embedding]]:
    """Yield the name and the module of each 8-bit layer in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, (Int8Linear, Int8Embedding)):
            yield name, module


# -- which layers -----------------------------------------------------------------------------------------------------


def layers_to_round(model: PreTrainedModel, embeddings: bool = True, keep: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Name -> layer of all that a base in 8 bits rounds: linear layers inside the base model, embedding and head.

    Left as they are: what lies outside of the base model (a task's head), and the modules inside of it that ``keep`` names.

    Args:
        model: with its weights, or on the meta device.
        embeddings: also the input embedding, the head of a language model, and what shares its weight with them.
        keep: modules, named as seen from inside the base model.
    """
    prefix = model.base_model_prefix
    inside = getattr(model, prefix, None) if prefix else None
    start = f"{prefix}." if isinstance(inside, nn.Module) else ""
    kept = tuple(keep)
    vocabulary = vocabulary_layers(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        within = name.removeprefix(start)
        if any(f"{within}.".startswith(f"{k}.") for k in kept):
            continue
        if name in vocabulary:
            if embeddings:
                found[name] = module
        elif name.startswith(start) and isinstance(module, (nn.Linear, Conv1D)):
            found[name] = module
    return {name: module for name, module in found.items() if _whole_group(name, vocabulary, found)}


def vocabulary_layers(model: PreTrainedModel) -> dict[str, str]:
    """Name of each layer that holds the vocabulary -> what it shares its weight with, or its own name.

    Only where all that share a weight are plain embeddings and linear layers: another class may scale what it looks up.
    """
    names = {id(module): name for name, module in model.named_modules()}
    asked = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = {names[id(layer)]: names[id(layer)] for layer in asked if layer is not None and id(layer) in names}
    tied = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in model.all_tied_weights_keys.items()
        if target.endswith(".weight") and source.endswith(".weight")
    }
    for target, source in tied.items():
        if source in found or target in found:
            found |= {source: source, target: source}
    return found


def _whole_group(name: str, vocabulary: dict[str, str], found: dict[str, nn.Module]) -> bool:
    """Whether all layers that share a weight with this one can be rounded; so for a layer that shares none."""
    if name not in vocabulary:
        return True
    group = [other for other, source in vocabulary.items() if source == vocabulary[name]]
    return all(type(found.get(other)) in (nn.Embedding, nn.Linear) for other in group)


def rounded_like(layer: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Int8Linear | Int8Embedding:
    """The 8-bit layer in place of ``layer``, with this weight (int8 [out, in], or what will be replaced by it) and scale."""
    if isinstance(layer, nn.Embedding):
        return Int8Embedding(weight, scale, dtype)
    bias = None if layer.bias is None else layer.bias.detach()
    return Int8Linear(weight, scale, bias, isinstance(layer, Conv1D), dtype)


def out_in(layer: Any) -> tuple[int, int]:
    """Output and input channels of a layer's weight; vocabulary and dim of an embedding's."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)
