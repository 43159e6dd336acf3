"""A weight in the 16 bits in which it is stored, and the linear layer and embedding that hold one and compute in fp32.

Unlike in the other formats nothing is rounded: every value of bf16 and fp16 is a value of fp32. A weight that is written to,
such as a merged one, is stored in fp32 from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakeet.kernels import fixed_order
from lorakeet.kernels.frozen_linear import frozen_linear
from lorakeet.kernels.half_linear import HALF, half_linear, half_linear_reference, input_gradient, product
from lorakeet.quant.int8 import plain_layer
from lorakeet.quant.protocol import QuantizedLayer


class HalfWeight(NamedTuple):
    """A weight [out, in] in bf16 or fp16, or in fp32 once it was written to."""

    weight: Tensor

    @property
    def mergeable(self) -> bool:
        """Whether the format is fine enough to merge into: yes, a written weight is fp32."""
        return True

    @property
    def out_features(self) -> int:
        """Output channels, or tokens."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Input channels, or the width of an embedding."""
        return self.weight.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return ``weight``."""
        return {"weight": self.weight}

    def product(self, x: Tensor, bias: Tensor | None = None, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute x·Wᵀ + b + u·vᵀ; see :func:`lorakeet.kernels.half_linear.product`."""
        return product(x, self.weight, bias, low_rank)

    def input_gradient(self, g: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute g·W + u·vᵀ; see :func:`lorakeet.kernels.half_linear.input_gradient`."""
        return input_gradient(g, self.weight, low_rank)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values [out, in]."""
        return self.weight.detach().to(dtype)

    def requantize(self, weight: Tensor) -> HalfWeight:
        """Return another weight of this shape, in fp32."""
        return HalfWeight(weight.to(torch.float32).contiguous())

    def is_rounding_of(self, weight: Tensor) -> bool:
        """Whether each value is the same."""
        return torch.equal(self.dequantize(), weight.float())

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows [..., in]."""
        return F.embedding(ids, self.weight).to(dtype)


class _HalfLayer(QuantizedLayer):
    """The parameter ``weight`` that linear layer and embedding have in common."""

    bits, exact = 16, True

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # that of nn.Embedding would allocate a weight
        self.dtype = dtype
        own = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.register_parameter("weight", own)

    def quantized_weight(self, tensors: Mapping[str, Tensor] | None = None) -> HalfWeight:
        given: Any = self._parameters if tensors is None else tensors
        return HalfWeight(given["weight"])


class HalfLinear(_HalfLayer):
    """A frozen linear layer whose weight is stored in 16 bits.

    Attributes:
        weight: bf16 or fp16 [out, in]; fp32 once it was written to.
        bias: [out] in fp32, or None.
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight, dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        small = fixed_order.is_active() and x.numel() * self.out_features <= fixed_order.SMALL
        if small or self.weight.requires_grad or self.weight.dtype not in HALF:
            return half_linear_reference(x, self.weight, self.bias)  # the product of torch, as in an fp32 layer
        return half_linear(x, self.weight, self.bias)

    def fused_forward(self, x: Tensor) -> Tensor:
        """Compute the layer as :func:`~lorakeet.kernels.frozen_linear.frozen_linear` computes an fp32 one, to the bit."""
        if self.weight.dtype not in HALF:
            return frozen_linear(x, self.weight.to(x.dtype), self.bias)
        return half_linear(x, self.weight, self.bias)

    def dequantized(self) -> nn.Module:
        made: Any = plain_layer(self)
        made.weight = nn.Parameter(self.weight.detach().to(self.dtype))
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, stored={str(self.weight.dtype).removeprefix('torch.')}"


class HalfEmbedding(_HalfLayer, nn.Embedding):
    """A frozen embedding whose weight is stored in 16 bits."""

    def __init__(self, weight: Tensor, padding_idx: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight, dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.max_norm = padding_idx, None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight).to(self.dtype)

    def dequantized(self) -> nn.Module:
        values = self.weight.detach().to(self.dtype)
        return nn.Embedding.from_pretrained(values, freeze=False, padding_idx=self.padding_idx)


def half_layer(dense: Any, weight: Tensor) -> HalfLinear | HalfEmbedding:
    """Build the layer that holds a weight in 16 bits in place of a dense one.

    Args:
        dense: The linear layer or embedding to replace, in fp32; its bias is taken over.
        weight: bf16 or fp16 [out, in].
    """
    if isinstance(dense, nn.Embedding):
        return HalfEmbedding(weight, dense.padding_idx, dense.weight.dtype)
    return HalfLinear(weight, None if dense.bias is None else dense.bias.detach(), dense.weight.dtype)


def widen_(model: PreTrainedModel, names: Iterable[str] | None = None) -> None:
    """Put plain fp32 layers in place of those in 16 bits.

    Args:
        model: The model.
        names: Layers to widen, whole groups of tied ones; None: all.
    """
    asked = None if names is None else set(names)
    for name, module in list(model.named_modules()):
        if isinstance(module, (HalfLinear, HalfEmbedding)) and (asked is None or name in asked):
            model.set_submodule(name, module.dequantized().requires_grad_(False))
    model.tie_weights()
