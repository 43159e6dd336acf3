"""The contract of a quantized weight, and the questions that other rooms ask about one.

A format is one class that answers :class:`QuantizedWeight`: the tensors of one weight and their products. A layer that holds
one derives from :class:`QuantizedLayer`. Code outside of this room asks the functions below: ``is_quantized``,
``weight_shape``, ``weight_dtype``, ``dense_weight``, ``weight_rows``. It names no format, and reads neither the dtype nor the
shape of a stored tensor, which may be packed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self, TypeGuard

import torch
from torch import Tensor, nn

from lorakeet.kernels.decoder_layer_training import TrainedLinear
from lorakeet.kernels.decoder_step import LinearWeights


class QuantizedWeight(Protocol):
    """Frozen weight W [out, in] in a format of its own; a value that refers to its tensors.

    ``kernels.lora_linear`` takes it in place of a dense weight.
    """

    @property
    def mergeable(self) -> bool:
        """Whether the format is fine enough to merge into; otherwise a merge is refused unless its loss is accepted."""

    @property
    def out_features(self) -> int:
        """Rows of W: output channels, or the vocabulary of an embedding."""

    @property
    def in_features(self) -> int:
        """Columns of W: input channels, or the width of an embedding."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by the name of their parameter, ``weight`` among them."""

    def product(self, x: Tensor, bias: Tensor | None = None, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute x·Wᵀ + b + u·vᵀ without autograd.

        Args:
            x: [n, in], any floating dtype.
            bias: [out] or None.
            low_rank: u [n, r] and v [out, r], or None.

        Returns:
            [n, out] in x's dtype.
        """

    def input_gradient(self, g: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute g·W + u·vᵀ without autograd, for g [n, out], u [n, r] and v [in, r]; [n, in] in g's dtype."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return W [out, in] in a floating dtype."""

    def requantize(self, weight: Tensor) -> Self:
        """Quantize a dense weight [out, in] as this one is quantized; shapes and dtypes are those of this one's tensors."""

    def is_rounding_of(self, weight: Tensor) -> bool:
        """Whether this is ``weight`` [out, in] up to the rounding of the format."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of W: ids [...] -> [..., in] in ``dtype``."""


class QuantizedLayer(nn.Module):
    """A frozen linear layer or embedding that holds a :class:`QuantizedWeight`; an embedding is an ``nn.Embedding`` too.

    The tensors of the weight are parameters of the layer, under the names that the format gives them. The one called
    ``weight`` is what layers share when they are tied. No other may be called ``bias``.

    Attributes:
        bits: Bits of a stored value, for messages.
        exact: Whether the values are those of the base's files: a format that only saves memory, and computes in fp32.
        dtype: The dtype of the layer before it was quantized; the layer computes in it.
        transposed: Whether that layer stored its weight as [in, out]; a quantized weight never is.
        bias: [out] in ``dtype``, or None.
    """

    bits: int = 0
    exact: bool = False
    dtype: torch.dtype
    transposed: bool = False

    def quantized_weight(self, tensors: Mapping[str, Tensor] | None = None) -> QuantizedWeight:
        """Return the layer's weight, or the weight that other tensors of this format hold (a gathered state dict's)."""
        raise NotImplementedError

    def dequantized(self) -> nn.Module:
        """Build the plain layer of the same values, in ``dtype``."""
        raise NotImplementedError

    def decoder_weights(self) -> LinearWeights | None:
        """Return the operands of the compiled decoder step; None where it cannot read the format."""
        return None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move the layer to another device or dtype; the tensors of the weight keep their own dtypes.

        Scales in half precision would change every product.
        """
        stored = {name: self._parameters[name].data for name in self.quantized_weight().tensors()}  # type: ignore[union-attr]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        for name, before in stored.items():
            parameter: Any = self._parameters[name]
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self


# -- questions --------------------------------------------------------------------------------------------------------


def is_quantized(module: nn.Module | None) -> TypeGuard[QuantizedLayer]:
    """Return True if ``module`` itself holds its weight in a quantized format; False for a LoRA layer around it."""
    return isinstance(module, QuantizedLayer)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield the name and the module of each quantized layer in ``model``."""
    for name, module in model.named_modules():
        if is_quantized(module):
            yield name, module


def is_rounded(module: nn.Module | None) -> bool:
    """Whether ``module`` holds its weight in a quantized format that has rounded it."""
    return is_quantized(module) and not module.exact


def has_rounded(model: nn.Module) -> bool:
    """Whether any layer in ``model``, or ``model`` itself, has a weight that was rounded."""
    return any(map(is_rounded, model.modules()))


def computing_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the floating dtypes that a model computes in: those of its parameters, and not those of stored weights."""
    layers = [layer for _, layer in quantized_layers(model)]
    stored = {id(tensor) for layer in layers for tensor in layer.quantized_weight().tensors().values()}
    plain = {p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in stored}
    return plain | {layer.dtype for layer in layers}


def quantized_bytes(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Count quantized layers, the bytes of all parameters, and the bytes of the model before it was quantized from ``dtype``.

    Returns:
        ``{"layers", "bytes", "full_bytes"}``; a weight that several layers share counts once among the bytes.
    """
    layers = [layer for _, layer in quantized_layers(model)]
    stored = {id(tensor) for layer in layers for tensor in layer.quantized_weight().tensors().values()}
    full = {id(layer.weight): math.prod(weight_shape(layer)) * dtype.itemsize for layer in layers}
    parameters = list(model.parameters())
    return {
        "layers": len(layers),
        "bytes": sum(p.nbytes for p in parameters),
        "full_bytes": sum(p.nbytes for p in parameters if id(p) not in stored) + sum(full.values()),
    }


def value_count(model: nn.Module) -> int:
    """Count the values of all parameters; those of a quantized weight, and not of its scales."""
    layers = [layer for _, layer in quantized_layers(model)]
    stored = {id(tensor) for layer in layers for tensor in layer.quantized_weight().tensors().values()}
    packed = {id(layer.weight): math.prod(weight_shape(layer)) for layer in layers}
    return sum(p.numel() for p in model.parameters() if id(p) not in stored) + sum(packed.values())


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight; of a quantized one [out, in], whatever its tensors look like."""
    if not is_quantized(layer):
        return tuple(layer.weight.shape)
    weight = layer.quantized_weight()
    return weight.out_features, weight.in_features


def weight_dtype(layer: Any) -> torch.dtype:
    """Return the floating dtype that a layer computes in: its weight's, or that of the layer that was quantized."""
    dtype: torch.dtype = layer.dtype if is_quantized(layer) else layer.weight.dtype
    return dtype


def dense_weight(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return a layer's weight in ``dtype`` (left out: the dtype it computes in); of a quantized one [out, in]."""
    dtype = dtype or weight_dtype(layer)
    weight: Tensor = layer.quantized_weight().dequantize(dtype) if is_quantized(layer) else layer.weight.to(dtype)
    return weight


def weight_rows(layer: Any, ids: Tensor) -> Tensor:
    """Return rows [n, ...] of a layer's weight, without a gradient, in the dtype that the layer computes in."""
    if is_quantized(layer):
        return layer.quantized_weight().rows(ids, layer.dtype).detach()
    rows: Tensor = layer.weight.detach()[ids]
    return rows


def dequantized_copy(module: nn.Module) -> nn.Module:
    """Copy ``module`` with plain layers in place of the quantized ones in it, so that it can be trained.

    The copy shares the model's configuration, which also says how attention is computed.
    """
    if is_quantized(module):
        return module.dequantized()
    configs = [config for inner in module.modules() if (config := inner.__dict__.get("config")) is not None]
    made = copy.deepcopy(module, {id(config): config for config in configs})
    for name, inner in list(quantized_layers(made)):
        made.set_submodule(name, inner.dequantized())
    return made


def frozen_weights(layer: nn.Module) -> TrainedLinear | None:
    """Return the operands of a linear layer in the compiled training step: plain, in 16 or in 8 bits; None for any other."""
    own: Any = layer
    if type(layer) is nn.Linear or (is_quantized(layer) and layer.exact and not isinstance(layer, nn.Embedding)):
        return TrainedLinear(own.weight, None, own.bias)
    own = layer.decoder_weights() if is_quantized(layer) else None
    return None if own is None or own.packed is not None else TrainedLinear(*own[:3])


def is_hooked(layer: nn.Module) -> bool:
    """Whether ``layer`` must be called: it has hooks, or a device map that brings its weight for ``forward`` alone."""
    return "forward" in layer.__dict__ or bool(layer._forward_hooks or layer._forward_pre_hooks)
