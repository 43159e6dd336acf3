"""Layers of a base in 8 bits, and which layers of a model become such.

Each weight is kept once, int8 [out, in], with one vector of fp32 numbers: scales for each output channel (for an embedding or
a head: for each token), and for layers inside the model for each input channel too; and a few columns that are not rounded.
Both are plain parameters that ask for no gradient, so that every way of spreading a model over processes carries them. Where
a head shares its weight with the embedding it shares the rounded weight and the scales too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakeet.kernels.decoder_step import LinearWeights
from lorakeet.kernels.int8.format import dequantize, quantize_rows, quantize_weight, rounding_steps
from lorakeet.kernels.int8.linear import int8_linear


class _Rounded(nn.Module):
    """What both kinds of layers share. ``dtype`` is the number format that the layer was in, and that it computes in."""

    scale: nn.Parameter
    dtype: torch.dtype
    transposed = False

    def unrounded(self) -> nn.Module:
        """A plain layer of the same values, in the base's number format."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Moved to another device or number format: the scales stay in fp32, or every product would change."""
        scale = self.scale.data
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale.data = scale.to(self.scale.device)
        return self


class Int8Linear(_Rounded):
    """A frozen linear layer whose weight is int8 [out, in], also where the original stored it the other way round.

    Attributes:
        weight: int8 [out, in].
        scale: fp32, what belongs to the weight's bytes: see :mod:`lorakeet.kernels.int8.format`.
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

    def factors(self) -> LinearWeights:
        """What this layer multiplies by."""
        own = self._parameters  # nn.Module's attribute look-up is slow, and this is asked for every layer and token
        return LinearWeights(own["weight"], own["scale"], own.get("bias"))  # type: ignore[arg-type]

    def unrounded(self) -> nn.Module:
        weight = dequantize(self.weight, self.scale, self.dtype)
        made: Any = plain_layer(self)
        made.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone())
        return made

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(_Rounded, nn.Embedding):
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

    def unrounded(self) -> nn.Module:
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


def weight_rows(layer: nn.Module, rows: Tensor) -> Tensor:
    """Rows [n, ...] of a layer's weight [rows, columns], in a floating dtype, also where the weight is rounded."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if not isinstance(layer, _Rounded):
        return weight.detach()[rows]
    return dequantize(weight.detach(), layer.scale.detach(), layer.dtype, rows)


def rounded_bytes(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """``{"layers", "bytes", "full_bytes"}``: layers in 8 bits, bytes of all parameters, and what they were in ``dtype``."""
    scales = {id(layer.scale) for _, layer in rounded_layers(model)}
    parameters = list(model.parameters())
    full = [
        p.numel() * (p.element_size() if p.element_size() > 1 else dtype.itemsize)
        for p in parameters
        if id(p) not in scales
    ]
    return {
        "layers": sum(1 for _ in rounded_layers(model)),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "full_bytes": sum(full),
    }


def floating(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of a state dict; the floating values of a rounded one."""
    tensor = state[name]
    return tensor if tensor.dtype != torch.int8 else dequantize(tensor, state[_scale_name(name)])


def holds(state: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    """Whether a state dict has this tensor under ``name``, for a rounded one: up to its rounding."""
    mine, tensor = state[name], tensor.to(state[name].device)
    if mine.dtype != torch.int8:
        return torch.equal(mine, tensor.to(mine.dtype))
    scale = state[_scale_name(name)]
    return bool(((dequantize(mine, scale) - tensor.float()).abs() <= 0.51 * rounding_steps(mine, scale)).all())


def put(state: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    """Write a tensor into a state dict's, rounded where that is rounded."""
    mine = state[name]
    if mine.dtype == torch.int8:
        scale = state[_scale_name(name)]
        tensor, made = round_weight(tensor.to(mine.device), vocabulary=len(scale) == len(mine))
        scale.copy_(made)
    mine.copy_(tensor)


def _scale_name(weight: str) -> str:
    return f"{weight.removesuffix('weight')}scale"


def unrounded(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that can learn: rounded layers in it become plain ones of the same values."""
    if isinstance(module, _Rounded):
        return module.unrounded()
    made = copy.deepcopy(module)
    for name, inner in list(made.named_modules()):
        if isinstance(inner, _Rounded):
            made.set_submodule(name, inner.unrounded())
    return made


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


def watched(layer: nn.Module) -> bool:
    """Whether ``layer`` must be called: a hook is there, or a device map's, which brings the weight only for forward."""
    return "forward" in layer.__dict__ or bool(layer._forward_hooks or layer._forward_pre_hooks)


def rounded_layers(model: nn.Module) -> Iterator[tuple[str, Int8Linear | Int8Embedding]]:
    """All layers in 8 bits, by name."""
    for name, module in model.named_modules():
        if isinstance(module, (Int8Linear, Int8Embedding)):
            yield name, module
