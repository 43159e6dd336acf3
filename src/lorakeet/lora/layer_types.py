"""The LoRA layer class of each module type, and the parts of a model that belong to an adapter already."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.lora.conv import LoraConv1d, LoraConv2d, LoraConv3d
from lorakeet.lora.embedding import LoraEmbedding
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.linear import LoraLinear
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.target_parameters import LoraParameters
from lorakeet.quant.protocol import is_quantized

_CONVOLUTIONS: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Conv1d: LoraConv1d,
    nn.Conv2d: LoraConv2d,
    nn.Conv3d: LoraConv3d,
}
#: Names of the module types that :func:`layer_class` knows, for messages.
ADAPTABLE = "Linear, Conv1D, Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention"


def layer_class(module: nn.Module) -> type[LoraLayer] | None:
    """Return the class that puts LoRA on ``module``; None if there is none."""
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if isinstance(module, (nn.Linear, Conv1D)) or is_quantized(module):
        return LoraLinear
    return next((layer for kind, layer in _CONVOLUTIONS.items() if isinstance(module, kind)), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the base's own module below a LoRA layer, or ``module`` itself."""
    return module.base_layer if isinstance(module, LoraLayer) else module


def adaptable(module: nn.Module) -> bool:
    """Whether LoRA can be put on ``module`` (again, if it has some)."""
    base = unwrapped(module)
    return layer_class(base) is not None or isinstance(base, nn.MultiheadAttention)


def inside_adapter(model: nn.Module, name: str) -> bool:
    """Whether ``name`` is a part of a LoRA layer, or of a module that is trained whole."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))
    return any(isinstance(module, (LoraLayer, LoraParameters, SavedModule)) for module in above)
