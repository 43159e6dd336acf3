"""Two small quantized formats, whose stored tensors do not have the shape of their weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakeet.quant.protocol import QuantizedLayer, QuantizedWeight
from lorakeet.quant.replace import QuantizedFormat, dense_shape


@dataclass(frozen=True)
class FakeWeight:
    """A weight [out, in] as packed codes and scales; products go through the dense weight."""

    weight: Tensor
    steps: Tensor
    shape: tuple[int, int]
    mergeable: ClassVar[bool]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @classmethod
    def quantize(cls, dense: Tensor, vocabulary: bool = False) -> Self:
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "steps": self.steps}

    def product(self, x: Tensor, bias: Tensor | None = None, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        h = F.linear(x, self.dequantize(x.dtype), bias)
        return h if low_rank is None else h + (low_rank[0] @ low_rank[1].T).to(h.dtype)

    def input_gradient(self, g: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        dx = g @ self.dequantize(g.dtype)
        return dx if low_rank is None else dx + (low_rank[0] @ low_rank[1].T).to(dx.dtype)

    def requantize(self, weight: Tensor) -> Self:
        return type(self).quantize(weight)

    def is_rounding_of(self, weight: Tensor) -> bool:
        return bool(((self.dequantize() - weight.float()).abs() <= 0.51 * self.steps).all())

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype)[ids]


class Fake16(FakeWeight):
    """16-bit codes in one run [out·in], with one scale; fine enough to merge into."""

    mergeable = True

    @classmethod
    def quantize(cls, dense: Tensor, vocabulary: bool = False) -> Self:
        step = (dense.abs().max() / 32767).float()
        return cls((dense.float() / step).round().short().flatten(), step, tuple(dense.shape))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.weight.float() * self.steps).view(self.shape).to(dtype)


class Fake4(FakeWeight):
    """4-bit codes packed in pairs [out, ⌈in/2⌉], with a scale for each row; too coarse to merge into."""

    mergeable = False

    @classmethod
    def quantize(cls, dense: Tensor, vocabulary: bool = False) -> Self:
        steps = (dense.abs().amax(1, keepdim=True) / 7).float().clamp_min(1e-12)
        codes = F.pad((dense.float() / steps).round() + 8, (0, dense.shape[1] % 2)).to(torch.uint8)
        return cls(codes[:, ::2] * 16 + codes[:, 1::2], steps, tuple(dense.shape))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = torch.stack((self.weight // 16, self.weight % 16), -1).flatten(1)[:, : self.shape[1]]
        return ((codes.float() - 8) * self.steps).to(dtype)


class _FakeLayer(QuantizedLayer):
    weight_type: type[FakeWeight]
    shape: tuple[int, int]

    def hold(self, dense: Any, weight: FakeWeight) -> None:
        """Take the tensors of ``weight`` as parameters."""
        self.weight_type, self.shape, self.dtype = type(weight), weight.shape, dense.weight.dtype
        for name, tensor in weight.tensors().items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def quantized_weight(self, tensors: Mapping[str, Tensor] | None = None) -> FakeWeight:
        given: Any = self._parameters if tensors is None else tensors
        return self.weight_type(given["weight"], given["steps"], self.shape)


class FakeLinear(_FakeLayer):
    """A linear layer in either format."""

    def __init__(self, dense: nn.Linear, weight: FakeWeight) -> None:
        super().__init__()
        self.bias = dense.bias
        self.hold(dense, weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized_weight().dequantize(x.dtype), self.bias)

    def dequantized(self) -> nn.Module:
        made = nn.Linear(self.shape[1], self.shape[0], self.bias is not None, dtype=self.dtype)
        made.weight = nn.Parameter(self.quantized_weight().dequantize(self.dtype))
        made.bias = self.bias
        return made


class FakeEmbedding(_FakeLayer, nn.Embedding):
    """An embedding in either format."""

    def __init__(self, dense: nn.Embedding, weight: FakeWeight) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = dense_shape(dense)
        self.hold(dense, weight)

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized_weight().rows(input, self.dtype)

    def dequantized(self) -> nn.Module:
        return nn.Embedding.from_pretrained(self.quantized_weight().dequantize(self.dtype), freeze=False)


def _layer(dense: Any, weight: QuantizedWeight) -> QuantizedLayer:
    assert isinstance(weight, FakeWeight)
    return (FakeEmbedding if isinstance(dense, nn.Embedding) else FakeLinear)(dense, weight)


def _format(kind: type[FakeWeight]) -> QuantizedFormat:
    def placeholder(shape: tuple[int, int], vocabulary: bool) -> QuantizedWeight:
        made = kind.quantize(torch.ones(shape))
        return kind(made.weight.to("meta"), made.steps.to("meta"), shape)

    return QuantizedFormat(kind.quantize, _layer, placeholder)


#: The formats by name.
FORMATS = {"16 bits": _format(Fake16), "4 bits": _format(Fake4)}
