"""The files of a 4-bit base as `transformers` with `bitsandbytes` writes and reads them; that package is not needed.

Beside ``weight``, a layer has ``weight.absmax``, the tables ``weight.quant_map`` and ``weight.nested_quant_map``, the scales
of scales ``weight.nested_absmax``, and a JSON text as bytes, ``weight.quant_state.bitsandbytes__nf4``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter

from lorakeet.errors import BaseModelError
from lorakeet.kernels.nf4.format import BLOCK, SCALE_BLOCK, SCALE_CODES, VALUES
from lorakeet.quant.nf4 import Nf4Linear, Nf4Weight

#: Name of the method in ``config.json``.
METHOD = "bitsandbytes"
_STATE = "weight.quant_state.bitsandbytes__nf4"
#: Tensors of a layer, longest first: the first name that a key of the files ends with is taken.
_LEAVES = ("weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax", _STATE, "weight")
#: Bytes. The longest JSON text that is read.
_LONGEST_STATE = 10_000


def config_dict() -> dict[str, Any]:
    """Return the entry ``quantization_config`` of ``config.json``."""
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
    }


def is_readable(config: Any) -> bool:
    """Whether a ``quantization_config`` of `bitsandbytes` says NF4, with two codes in a byte."""
    given = config if isinstance(config, Mapping) else vars(config)
    four = given.get("load_in_4bit") or given.get("_load_in_4bit")
    kinds = given.get("bnb_4bit_quant_type", "fp4"), str(given.get("bnb_4bit_quant_storage", "uint8"))
    return bool(four) and kinds[0] == "nf4" and kinds[1].removeprefix("torch.") == "uint8"


# ---- reading --------------------------------------------------------------------------------------------------------


def conversions(refused: list[str]) -> list[WeightConverter]:
    """Return the steps of transformers' loader that make the tensors of Lorakeet's layers.

    Args:
        refused: Receives the names of layers that are in another format; transformers would not pass an error on.
    """
    return [WeightConverter([*_LEAVES], "weight", operations=[_Read(refused)])]


def without_conversions(model: PreTrainedModel) -> None:
    """Let a loaded model forget the steps of :func:`conversions`, which saving it would undo."""
    steps = getattr(model, "_weight_conversions", None) or []
    own = [step for step in steps if any(isinstance(part, _Read) for part in getattr(step, "operations", ()))]
    if own:
        model._weight_conversions = [step for step in steps if step not in own]


def refused_error(names: list[str]) -> BaseModelError:
    """Build the error for layers that are in another format."""
    return BaseModelError(
        f"{len(names)} layers are not in NF4 with blocks of {BLOCK}, as bitsandbytes writes it: {', '.join(names[:5])}",
        "give the full-precision model, and --bits 4",
    )


class _Read(ConversionOps):
    """Conversion of the tensors of one layer in the files into those that the model holds of it."""

    def __init__(self, refused: list[str]) -> None:
        self.refused = refused

    def __deepcopy__(self, memo: dict[int, Any]) -> _Read:
        return self  # transformers copies the step for each layer; the list is one

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], full_layer_name: str | None = None, **_: Any) -> dict[str, Tensor]:
        given = {name: part[0] if isinstance(part, list) else part for name, part in input_dict.items()}
        full_name = full_layer_name or "weight"
        if len(given) == 1:
            return {full_name: given["weight"]}
        owner = full_name.removesuffix("weight")
        made = {"weight": given["weight"], "absmax": given["weight.absmax"]}
        state = _state(given)
        if state is None:
            self.refused.append(owner.removesuffix("."))
        elif "weight.nested_absmax" in given:
            offset = torch.tensor([state["nested_offset"]], dtype=torch.float32)
            made["nested"] = torch.cat((offset, given["weight.nested_quant_map"], given["weight.nested_absmax"]))
        return {f"{owner}{leaf}": tensor for leaf, tensor in made.items()}


def _state(given: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Read the JSON text of a layer; None if its blocks and values are not those of the format."""
    text = given.get(_STATE)
    try:
        if text is None or text.numel() > _LONGEST_STATE:
            return None
        state: dict[str, Any] = json.loads(bytes(text.tolist()))
        same = state["quant_type"] == "nf4" and state["blocksize"] == BLOCK
        same = same and torch.equal(given["weight.quant_map"], torch.tensor(VALUES))
        if "weight.nested_absmax" in given:
            table = given["weight.nested_quant_map"]
            same = same and state["nested_blocksize"] == SCALE_BLOCK and table.shape == (SCALE_CODES,)
            state["nested_offset"] = float(state["nested_offset"])
    except (ValueError, KeyError, TypeError):
        return None
    return state if same else None


# ---- writing --------------------------------------------------------------------------------------------------------


def state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model under the names of this layout; only layers in four bits have others."""
    made = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, Nf4Linear):
            for leaf in layer.quantized_weight().tensors():
                del made[f"{name}.{leaf}"]
            made |= {f"{name}.{leaf}": tensor for leaf, tensor in _tensors(layer, layer.quantized_weight()).items()}
    return made


def _tensors(layer: nn.Module, weight: Nf4Weight) -> dict[str, Tensor]:
    dtype = str(layer.dtype).removeprefix("torch.")
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(weight.shape)}
    made = {"weight": weight.weight, "weight.absmax": weight.absmax, "weight.quant_map": torch.tensor(VALUES)}
    if (nested := weight.nested) is not None:
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": float(nested[0])}
        made["weight.nested_quant_map"] = nested[1 : 1 + SCALE_CODES].clone()
        made["weight.nested_absmax"] = nested[1 + SCALE_CODES :].clone()
    made[_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return made
