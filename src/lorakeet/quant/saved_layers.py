"""The layers that the files of a base hold in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lorakeet.errors import BaseModelError
from lorakeet.quant.layer_selection import layers_to_quantize


def layers_saved_in_int8(model: PreTrainedModel, files: Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers of ``model`` whose weights the files hold in 8 bits, by name.

    Raises:
        BaseModelError: an 8-bit weight of the files has no scales, or belongs to no layer of this model.
    """
    # Some architectures have other names in their files than in the model.
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    skeleton = model.state_dict()
    names = {
        rename_source_key(f"{owner}.weight", renamings, [], model.base_model_prefix, skeleton)[0].removesuffix(
            ".weight"
        )
        for owner in _int8_owners(files)
    }
    tied = {
        key.removesuffix(".weight"): value.removesuffix(".weight") for key, value in model.all_tied_weights_keys.items()
    }
    chosen = {name: module for name, module in layers_to_quantize(model).items() if tied.get(name, name) in names}
    stray = sorted(name for name in names - set(chosen) if f"{name}.weight" in skeleton or not _is_head(name))
    if stray:
        raise BaseModelError(
            f"{len(stray)} weights in 8 bits belong to no layer of {type(model).__name__}: {', '.join(stray[:5])}",
            "write the base again with `lorakeet quantize`",
        )
    return chosen


def _int8_owners(files: Iterable[str]) -> set[str]:
    """Return the names in the files of the layers with an 8-bit weight; check that each has its scales."""
    quantized: set[str] = set()
    scales: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                owner, _, leaf = name.rpartition(".")
                if leaf == "scale":
                    scales.add(owner)
                elif leaf == "weight" and file.get_slice(name).get_dtype() == "I8":
                    quantized.add(owner)
    if halves := sorted(quantized ^ scales):
        raise BaseModelError(
            f"{len(halves)} weights in 8 bits lack their numbers or their scales in the files: {', '.join(halves[:5])}",
            "get the base's files again, or write them again with `lorakeet quantize`",
        )
    return quantized


def _is_head(name: str) -> bool:
    """Whether a layer of the files is a language model's head, which another task's model leaves out."""
    return name.rpartition(".")[2] in ("lm_head", "embed_out", "decoder", "output_projection", "vocab_projector")
