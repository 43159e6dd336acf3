"""The layers that the files of a base hold quantized, and in which format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lorakeet.errors import BaseModelError
from lorakeet.quant.int8 import INT8
from lorakeet.quant.layer_selection import layers_to_quantize, vocabulary_layers
from lorakeet.quant.nf4 import nf4_placeholder
from lorakeet.quant.protocol import QuantizedWeight
from lorakeet.quant.replace import dense_shape

#: Builds a weight as a file stores it, on the meta device, from its shape and whether each row belongs to a token.
Placeholder = Callable[[tuple[int, int], bool], QuantizedWeight]
#: Names of the scales in the layout of `bitsandbytes`, from the names that Lorakeet stores.
_FOREIGN = re.compile(r"\.weight\.(?=absmax$|nested_absmax$)")


def saved_layers(model: PreTrainedModel, files: Iterable[str]) -> dict[str, QuantizedWeight]:
    """Return the weights of ``model`` that the files hold quantized, on the meta device, by the name of their layer.

    Raises:
        BaseModelError: A quantized weight of the files has no scales, or belongs to no layer of this model.
    """
    # Some architectures have other names in their files than in the model.
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    skeleton = model.state_dict()
    found = {
        rename_source_key(f"{owner}.weight", renamings, [], model.base_model_prefix, skeleton)[0].removesuffix(
            ".weight"
        ): make
        for owner, make in _owners(files).items()
    }
    tied = {
        key.removesuffix(".weight"): value.removesuffix(".weight") for key, value in model.all_tied_weights_keys.items()
    }
    layers = layers_to_quantize(model)
    chosen = {name: found[tied.get(name, name)] for name in layers if tied.get(name, name) in found}
    stray = sorted(name for name in found.keys() - chosen.keys() if f"{name}.weight" in skeleton or not _is_head(name))
    if stray:
        raise BaseModelError(
            f"{len(stray)} quantized weights belong to no layer of {type(model).__name__}: {', '.join(stray[:5])}",
            "write the base again with `lorakeet quantize`",
        )
    vocabulary = vocabulary_layers(model)
    return {name: make(dense_shape(layers[name]), name in vocabulary) for name, make in chosen.items()}


def _owners(files: Iterable[str]) -> dict[str, Placeholder]:
    """Return the formats of the quantized layers by their names in the files; check that each has its scales."""
    stored: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            stored |= {_FOREIGN.sub(".", name): file.get_slice(name).get_dtype() for name in names}
    owners = {name.removesuffix(".weight") for name, kind in stored.items() if name.endswith(".weight")}
    owners = {owner for owner in owners if stored[f"{owner}.weight"] in ("I8", "U8")}
    scaled = {name.rpartition(".")[0] for name in stored if name.rpartition(".")[2] in ("scale", "absmax")}
    made = {owner: _format_of(owner, stored) for owner in owners & scaled}
    if halves := sorted((owners ^ scaled) | {owner for owner, make in made.items() if make is None}):
        raise BaseModelError(
            f"{len(halves)} quantized weights lack their numbers or their scales in the files: {', '.join(halves[:5])}",
            "get the base's files again, or write them again with `lorakeet quantize`",
        )
    return {owner: make for owner, make in made.items() if make is not None}


def _format_of(owner: str, stored: dict[str, str]) -> Placeholder | None:
    """Return the format of a layer's tensors; None if they belong to none."""
    kinds = [stored.get(f"{owner}.{leaf}") for leaf in ("weight", "scale", "absmax")]
    if kinds[0] == "I8" and kinds[1] and not kinds[2]:
        return INT8.placeholder
    if kinds == ["U8", None, "F32"]:
        return partial(_nf4, double=False)
    nested = stored.get(f"{owner}.nested", stored.get(f"{owner}.nested_absmax"))
    return _nf4 if kinds == ["U8", None, "U8"] and nested == "F32" else None


def _nf4(shape: tuple[int, int], vocabulary: bool, double: bool = True) -> QuantizedWeight:
    return nf4_placeholder(shape, double)


def _is_head(name: str) -> bool:
    """Whether a layer of the files is a language model's head, which another task's model leaves out."""
    return name.rpartition(".")[2] in ("lm_head", "embed_out", "decoder", "output_projection", "vocab_projector")
