"""The 8-bit format: its weight, and the linear layer and embedding that hold one.

A weight is stored once, as int8 [out, in] with one vector of fp32 numbers. That vector has a scale for each output channel;
inside the model also a scale for each input channel and a few columns in fp32. An embedding or head has one scale for each
token. Both tensors are plain parameters without a gradient, so that every way of spreading a model over processes carries
them. A head that shares its weight with the embedding shares both tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet.kernels.decoder_step import LinearWeights
from lorakeet.kernels.fixed_order import fixed_order
from lorakeet.kernels.int8.format import dequantize, quantize_rows, quantize_weight, rounding_steps, scale_size
from lorakeet.kernels.int8.linear import input_gradient, int8_linear, product
from lorakeet.quant.protocol import QuantizedLayer, QuantizedWeight
from lorakeet.quant.replace import QuantizedFormat

#: Rows of a weight that are worked on at a time where rows are independent: a vocabulary is the largest weight of all.
BLOCK_ROWS = 1024


class Int8Weight(NamedTuple):
    """A weight in 8 bits: int8 [out, in] and the fp32 vector that belongs to it (:mod:`lorakeet.kernels.int8.format`)."""

    weight: Tensor
    scale: Tensor

    @property
    def mergeable(self) -> bool:
        """Whether the format is fine enough to merge into: no, 8 bits would lose the update."""
        return False

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
        return quantize_dense(weight, len(self.scale) == len(self.weight))

    def is_rounding_of(self, weight: Tensor) -> bool:
        """Whether each value is at most half a rounding step away."""
        error = (self.dequantize() - weight.float()).abs()
        return bool((error <= 0.51 * rounding_steps(self.weight, self.scale)).all())

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows [..., in]."""
        return dequantize(self.weight, self.scale, dtype, ids.flatten()).unflatten(0, ids.shape)


def quantize_dense(weight: Tensor, vocabulary: bool = False) -> Int8Weight:
    """Quantize a dense weight [out, in].

    Args:
        weight: Any floating dtype, finite.
        vocabulary: Each row belongs to a token, and rows may be added later: use one scale for each.
    """
    with fixed_order():
        if not vocabulary:
            return Int8Weight(*quantize_weight(weight))
        made = Int8Weight(
            weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
        )
        for rows, rounded, scale in zip(*(each.split(BLOCK_ROWS) for each in (weight, *made)), strict=True):
            for into, values in zip((rounded, scale), quantize_rows(rows), strict=True):
                into.copy_(values)
        return made


class _Int8Layer(QuantizedLayer):
    """The parameters ``weight`` and ``scale`` that linear layer and embedding have in common."""

    bits = 8
    scale: nn.Parameter

    def quantized_weight(self, tensors: Mapping[str, Tensor] | None = None) -> Int8Weight:
        given: Any = self._parameters if tensors is None else tensors
        return Int8Weight(given["weight"], given["scale"])


class Int8Linear(_Int8Layer):
    """A frozen linear layer whose weight is int8 [out, in], also where the original stored it as [in, out].

    Attributes:
        weight: int8 [out, in].
        scale: fp32; its layout is that of :mod:`lorakeet.kernels.int8.format`.
        bias: [out] in the base's dtype, or None.
        transposed: Whether the original stored its weight as [in, out].
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
        own = self._parameters  # nn.Module's attribute look-up is slow, and every layer is asked for every token
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
        nn.Module.__init__(self)  # that of nn.Embedding would allocate a weight
        if scale.shape != weight.shape[:1]:
            raise ValueError(f"got {len(scale)} scales for an embedding of {len(weight)} tokens, expected one for each")
        self.dtype = dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.weight).float()
        return rows.mul_(F.embedding(input, self.scale.unsqueeze(1))).to(self.dtype)

    def dequantized(self) -> nn.Module:
        return nn.Embedding.from_pretrained(dequantize(self.weight, self.scale, self.dtype), freeze=False)


def plain_layer(layer: QuantizedLayer) -> nn.Module:
    """Build a plain layer of the kind, shape and dtype of a quantized one, with uninitialized values."""
    own: Any = layer
    device_dtype: dict[str, Any] = {"device": own.weight.device, "dtype": layer.dtype}
    if isinstance(layer, nn.Embedding):
        return nn.utils.skip_init(nn.Embedding, layer.num_embeddings, layer.embedding_dim, **device_dtype)
    if layer.transposed:
        return Conv1D(own.out_features, own.in_features).to(**device_dtype)
    return nn.utils.skip_init(nn.Linear, own.in_features, own.out_features, own.bias is not None, **device_dtype)


def int8_layer(dense: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Int8Linear | Int8Embedding:
    """Build the 8-bit layer that replaces a dense one.

    Args:
        dense: The linear layer, ``Conv1D`` or embedding to replace; its bias is taken over.
        weight: int8 [out, in], or a placeholder that the loader replaces.
        scale: fp32.
        dtype: The dtype to compute in.
    """
    if isinstance(dense, nn.Embedding):
        return Int8Embedding(weight, scale, dtype)
    bias = None if dense.bias is None else dense.bias.detach()
    return Int8Linear(weight, scale, bias, isinstance(dense, Conv1D), dtype)


def _layer_of(dense: Any, weight: QuantizedWeight) -> QuantizedLayer:
    tensors = weight.tensors()
    return int8_layer(dense, tensors["weight"], tensors["scale"], dense.weight.dtype)


def _placeholder(shape: tuple[int, int], vocabulary: bool) -> Int8Weight:
    weight = torch.empty(shape, dtype=torch.int8, device="meta")
    return Int8Weight(
        weight, torch.empty(shape[0] if vocabulary else scale_size(*shape), dtype=torch.float32, device="meta")
    )


#: The 8-bit format, for :func:`~lorakeet.quant.replace.replace_layers_`.
INT8 = QuantizedFormat(quantize_dense, _layer_of, _placeholder)
