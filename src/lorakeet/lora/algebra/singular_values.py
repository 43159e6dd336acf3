"""An AdaLoRA adapter as plain LoRA: s and the singular values multiplied into B, triplets that are zero left out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorakeet.lora.algebra.settings import with_ranks
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.interop.wrappers import canonical
from lorakeet.lora.variants.adalora import SINGULAR_VALUES, AdaLora

#: Beginning of each key in an adapter's file, before the name of the layer.
_PREFIX = "base_model.model."


def fold_singular_values(config: PeftConfig, tensors: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return settings and tensors of the plain LoRA adapter with the same update; of any other variant the same ones.

    A layer that has no triplet left keeps one, with a B of zeros, as no tool reads a rank of zero.

    Args:
        config: Settings of the adapter.
        tensors: Its tensors, by the keys of its file.
    """
    if not isinstance(config.variant, AdaLora):
        return config, dict(tensors)
    folded, ranks, end = dict(tensors), {}, f".{SINGULAR_VALUES}"
    for key in [key for key in tensors if key.endswith(end)]:
        layer = key.removesuffix(end)
        values = folded.pop(key).flatten()
        kept = values.nonzero().flatten()
        kept = kept if len(kept) else kept.new_zeros(1)
        name_a, name_b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        scale = config.scaling(len(values), config.lora_alpha)
        folded[name_a] = tensors[name_a][kept].contiguous()
        folded[name_b] = (tensors[name_b] * (values * scale))[:, kept].contiguous()
        ranks[canonical(layer.removeprefix(_PREFIX))] = len(kept)
    return with_ranks(config, ranks, adalora_config=None), folded
