"""Magnitudes of output channels, as :mod:`lorakeet.lora.variants.dora` trains them, and the norms they are divided by."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.kernels.weight_norm import channel_norms
from lorakeet.lora.variants.variant import AdaptedLayer
from lorakeet.quant.protocol import dense_weight, is_quantized, is_rounded, weight_dtype, weight_shape

#: Elements of the blocks in which a weight is converted to the adapter's dtype, 4 MB in fp32: they stay in the cache.
_BLOCK = 1 << 20


class Magnitude(nn.Module):
    """Magnitude m of each output channel, and the norm that it is divided by.

    Attributes:
        weight: m, in a shape that broadcasts with the layer's outputs.
    """

    def __init__(self, layer: AdaptedLayer, adapter: str) -> None:
        super().__init__()
        self._known: _Known | None = None
        self.weight = nn.Parameter(layer.for_outputs(self.norms(layer, adapter)).clone())

    def norms(self, layer: AdaptedLayer, adapter: str) -> Tensor:
        """Return ‖W₀ + s·B·A‖ [out], in the adapter's dtype and without a gradient."""
        a, b = (matrix.detach() for matrix in layer.matrices(adapter))
        if not _Known.possible(a, layer):
            return _norms(layer, a, b, layer.scaling[adapter])
        if self._known is None or not self._known.is_of(layer, a, b, layer.scaling[adapter]):
            with torch.inference_mode(False):  # later passes, with gradients too, use these norms
                self._known = _Known(layer, a, b, layer.scaling[adapter])
        return self._known.norms

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}


class _Known:
    """Norms of a layer, and what they were computed from: micro-batches, evaluation and generation use them again."""

    def __init__(self, layer: AdaptedLayer, a: Tensor, b: Tensor, scaling: float) -> None:
        self.norms = _norms(layer, a, b, scaling)
        self.a, self.b, self.scaling = a.clone(), b.clone(), scaling
        self.base = [(weakref.ref(t), t.data_ptr(), t._version) for t in _stored(layer)]

    @staticmethod
    def possible(a: Tensor, layer: AdaptedLayer) -> bool:
        """Whether a comparison is cheap and certain; on another device it would wait for the device."""
        certain = all(type(t) is nn.Parameter and not t.is_inference() for t in _stored(layer))
        return a.is_cpu and certain and not torch.compiler.is_compiling()

    def is_of(self, layer: AdaptedLayer, a: Tensor, b: Tensor, scaling: float) -> bool:
        """Check that A, B and s have these values, and that the base's tensors are the same, unchanged.

        Args:
            layer: The adapted layer.
            a: A, detached.
            b: B, detached.
            scaling: s.

        Returns:
            Whether the norms need not be computed again.
        """
        now = _stored(layer)
        same = len(now) == len(self.base) and all(
            ref() is t and address == t.data_ptr() and version == t._version
            for t, (ref, address, version) in zip(now, self.base, strict=True)
        )
        same_dtype = a.dtype == self.a.dtype and a.device == self.a.device
        return same and same_dtype and scaling == self.scaling and torch.equal(a, self.a) and torch.equal(b, self.b)


def _stored(layer: AdaptedLayer) -> list[Tensor]:
    """Return the base layer's weight, or the tensors that stand for it."""
    base = layer.base_layer
    return list(base.quantized_weight().tensors().values()) if is_quantized(base) else [base.weight]


@torch.no_grad()
def _norms(layer: AdaptedLayer, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Compute ‖W₀ + s·B·A‖ of each output channel, in fp32 or wider."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    wide_a, wide_b, blocks = a.to(dtype), b.to(dtype), _blocks(layer.base_layer, dtype)
    if getattr(layer.base_layer, "groups", 1) == 1:
        return channel_norms(blocks, wide_a, wide_b, scaling, layer.channel_dim).to(a.dtype)
    # no weight of the base's shape is the update of grouped convolutions; PEFT folds it into that shape for the norm
    weight = torch.cat(list(blocks))
    folded = (wide_b.reshape(-1, len(wide_a)) @ wide_a).view_as(weight)
    return torch.linalg.vector_norm(weight + scaling * folded, dim=1).to(a.dtype)


def _blocks(base: Any, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the stored weight as a matrix, in blocks of rows."""
    weight: Tensor = base.weight.detach()
    if not is_rounded(base) and weight_dtype(base) == dtype:
        yield dense_weight(base).detach().flatten(1)
        return
    rows, *columns = weight_shape(base)
    step = max(_BLOCK // math.prod(columns), 1)
    for start in range(0, rows, step):
        if is_quantized(base):
            ids = torch.arange(start, min(start + step, rows), device=weight.device)
            yield base.quantized_weight().rows(ids, dtype).detach()
        else:
            yield weight[start : start + step].to(dtype).flatten(1)
