"""A base in 8 bits: every linear layer inside the model becomes :class:`Int8Linear`; head, norms and embeddings stay.

The weight is kept once, int8 [out, in] with one fp32 scale for each output channel, both plain parameters that ask for no
gradient (so that every way of spreading a model over processes carries them). An output embedding stays as it is: it is often
the input embedding too, and its rounding would show in every logit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakeet.errors import BaseModelError
from lorakeet.kernels.int8 import int8_linear, quantise_rows


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is int8 [out, in], also where the original stored it the other way round.

    Attributes:
        weight: int8 [out, in].
        scale: fp32 [out].
        bias: [out] in the base's dtype, or None.
        transposed: whether the original stored its weight as [in, out].
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def of(cls, layer: nn.Module) -> Int8Linear:
        """The 8-bit form of an ``nn.Linear`` or of GPT-2's ``Conv1D`` (whose weight is [in, out])."""
        dense: Any = layer
        weight = dense.weight.detach()
        transposed = isinstance(layer, Conv1D)
        rounded, scale = quantise_rows(weight.T.contiguous() if transposed else weight)
        return cls(rounded, scale, None if dense.bias is None else dense.bias.detach(), transposed)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@torch.no_grad()
def quantise(model: PreTrainedModel, keep: Iterable[str] = ()) -> int:
    """Put every linear layer of the base model into 8 bits, in place, one after the other; returns how many.

    Left as they are: the output embedding, what lies outside of the base model (a task's head), and the modules inside of it
    that ``keep`` names.

    Raises:
        BaseModelError: a weight has NaN or infinite values, or the model is quantised in another way already.
    """
    other = getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None)
    if other is not None:
        raise BaseModelError(
            f"this base is quantised already ({type(other).__name__})",
            "load it as it is, or give the full-precision model",
        )
    targets = list(linear_layers(model, set(keep)))
    broken = [name for name, layer in targets if not torch.isfinite(layer.weight).all()]
    if broken:
        raise BaseModelError(
            f"{len(broken)} weights have NaN or infinite values: {', '.join(broken[:5])}", "get the base's files again"
        )
    for name, layer in targets:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Int8Linear.of(layer))
    return len(targets)


def linear_layers(model: PreTrainedModel, keep: set[str]) -> Iterator[tuple[str, Any]]:
    """Names and layers that :func:`quantise` changes; ``keep`` names modules as seen from inside the base model."""
    prefix = model.base_model_prefix
    inside = getattr(model, prefix, None) if prefix else None
    start = f"{prefix}." if isinstance(inside, nn.Module) else ""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        within = name.removeprefix(start)
        kept = not name.startswith(start) or module is head or any(f"{within}.".startswith(f"{k}.") for k in keep)
        if isinstance(module, (nn.Linear, Conv1D)) and not kept and not module.weight.requires_grad:
            yield name, module
