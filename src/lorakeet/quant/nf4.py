"""The 4-bit format: its weight, and the linear layer that holds one.

The layers inside a model are stored in NF4 (:mod:`lorakeet.kernels.nf4.format`). An embedding or head is stored in 8 bits:
each token has its own scale there, and rows can be added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.kernels.decoder_step import LinearWeights
from lorakeet.kernels.fixed_order import fixed_order
from lorakeet.kernels.nf4.format import (
    BLOCK,
    MAX_ERROR,
    Nf4Tensors,
    block_count,
    block_scales,
    code_count,
    dequantize,
    dequantize_at,
    nested_size,
    quantize,
)
from lorakeet.kernels.nf4.linear import input_gradient, nf4_linear, product
from lorakeet.quant.int8 import INT8, Int8Weight, plain_layer
from lorakeet.quant.protocol import QuantizedLayer, QuantizedWeight
from lorakeet.quant.replace import QuantizedFormat


class Nf4Weight(Nf4Tensors):
    """A weight in four bits (:mod:`lorakeet.kernels.nf4.format`)."""

    @property
    def mergeable(self) -> bool:
        """Whether the format is fine enough to merge into: no, four bits would lose the update."""
        return False

    @property
    def out_features(self) -> int:
        """Output channels."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Input channels."""
        return self.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return ``weight``, ``absmax``, and ``nested`` if the scales are rounded."""
        found = {"weight": self.weight, "absmax": self.absmax}
        return found if self.nested is None else {**found, "nested": self.nested}

    def product(self, x: Tensor, bias: Tensor | None = None, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute x·Wᵀ + b + u·vᵀ; see :func:`lorakeet.kernels.nf4.linear.product`."""
        return product(x, self, bias, low_rank)

    def input_gradient(self, g: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute g·W + u·vᵀ; see :func:`lorakeet.kernels.nf4.linear.input_gradient`."""
        return input_gradient(g, self, low_rank)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values [out, in]."""
        return dequantize(self, dtype)

    def requantize(self, weight: Tensor) -> Nf4Weight:
        """Quantize another weight of this shape, with scales of the same kind."""
        return quantize_layer(weight, self.nested is not None)

    def is_rounding_of(self, weight: Tensor) -> bool:
        """Whether each value is at most as far away as four bits round it."""
        exact = quantize(weight, double=False)
        steps = torch.maximum(exact.absmax, block_scales(self).abs()).repeat_interleave(BLOCK)[: weight.numel()]
        error = (self.dequantize() - weight.float()).abs().flatten()
        return bool((error <= MAX_ERROR * steps + (block_scales(self) - exact.absmax).abs().max()).all())

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows [..., in]."""
        return dequantize_at(self, ids.flatten(), dtype).unflatten(0, ids.shape)


def quantize_layer(weight: Tensor, double: bool = True) -> Nf4Weight:
    """Quantize the dense weight [out, in] of a layer.

    Args:
        weight: Any floating dtype, finite.
        double: Round the scales to 8 bits, too.
    """
    with fixed_order():
        return Nf4Weight(*quantize(weight, double))


class Nf4Linear(QuantizedLayer):
    """A frozen linear layer whose weight is stored in four bits, also where the original stored it as [in, out].

    Attributes:
        weight: Codes, uint8 [⌈out·in/2⌉, 1].
        absmax: Scales of the blocks, uint8 or fp32.
        nested: Scales of the scales, fp32, or None.
        bias: [out] in the base's dtype, or None.
        transposed: Whether the original stored its weight as [in, out].
    """

    bits = 4

    def __init__(
        self,
        weight: Nf4Tensors,
        bias: Tensor | None = None,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.transposed, self.dtype = transposed, dtype
        self.out_features, self.in_features = weight.shape
        for name, tensor in (*weight._asdict().items(), ("bias", bias)):
            if name != "shape":
                frozen = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(name, frozen)

    def quantized_weight(self, tensors: Mapping[str, Tensor] | None = None) -> Nf4Weight:
        given: Any = self._parameters if tensors is None else tensors
        shape = self.out_features, self.in_features
        return Nf4Weight(given["weight"], given["absmax"], given.get("nested"), shape)

    def forward(self, x: Tensor) -> Tensor:
        return nf4_linear(x, self.quantized_weight(), self._parameters["bias"])

    def decoder_weights(self) -> LinearWeights | None:
        own: Any = self._parameters
        shape = self.out_features, self.in_features
        return LinearWeights(own["weight"], own["absmax"], own["bias"], nested=own["nested"], packed=shape)

    def dequantized(self) -> nn.Module:
        weight = dequantize(self.quantized_weight(), self.dtype)
        made: Any = plain_layer(self)
        made.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight)
        if (bias := self._parameters["bias"]) is not None:
            made.bias = nn.Parameter(bias.detach().clone())
        return made

    def extra_repr(self) -> str:
        has_bias = self._parameters["bias"] is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}"


def nf4_placeholder(shape: tuple[int, int], double: bool = True) -> Nf4Weight:
    """Build an NF4 weight on the meta device.

    Args:
        shape: (out, in).
        double: Whether its scales are rounded to 8 bits.
    """
    blocks = block_count(shape)
    codes = torch.empty(code_count(shape), 1, dtype=torch.uint8, device="meta")
    absmax = torch.empty(blocks, dtype=torch.uint8 if double else torch.float32, device="meta")
    nested = torch.empty(nested_size(shape), dtype=torch.float32, device="meta") if double else None
    return Nf4Weight(codes, absmax, nested, shape)


def _quantize(dense: Tensor, vocabulary: bool) -> QuantizedWeight:
    return INT8.quantize(dense, vocabulary) if vocabulary else quantize_layer(dense)


def _layer_of(dense: Any, weight: QuantizedWeight) -> QuantizedLayer:
    if isinstance(weight, Int8Weight):
        return INT8.layer(dense, weight)
    assert isinstance(weight, Nf4Weight)
    bias = None if dense.bias is None else dense.bias.detach()
    return Nf4Linear(weight, bias, not isinstance(dense, nn.Linear), dense.weight.dtype)


def _placeholder(shape: tuple[int, int], vocabulary: bool) -> QuantizedWeight:
    return INT8.placeholder(shape, vocabulary) if vocabulary else nf4_placeholder(shape)


#: The 4-bit format, for :func:`~lorakeet.quant.replace.replace_layers_`; vocabularies are in 8 bits.
NF4 = QuantizedFormat(_quantize, _layer_of, _placeholder)
