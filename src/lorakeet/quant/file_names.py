"""Names and number formats of the tensors in the files of a base."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

#: Formats of safetensors -> torch dtype. fp64 is stored as fp32, the widest format that a base is loaded in.
FLOATING = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class NamesInModel:
    """Names in a model of the tensors in its files.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        steps = get_model_conversion_mapping(model)
        self.renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self.converters = [step for step in steps if not isinstance(step, WeightRenaming)]
        self.prefix, self.skeleton = model.base_model_prefix, model.state_dict()

    def of(self, key: str) -> tuple[str, bool]:
        """Return the name of a file's tensor, and whether loading converts it."""
        name, converter = rename_source_key(key, self.renamings, self.converters, self.prefix, self.skeleton)
        return name, converter is not None


def floating_formats(file: Path) -> dict[str, torch.dtype]:
    """Return the number format of each floating tensor in a file; the scales of quantized weights are none of them."""
    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        stored = {name: opened.get_slice(name).get_dtype() for name in names}
    owners = {name for name, kind in stored.items() if kind in ("I8", "U8") and name.endswith(".weight")}
    scales = {f"{owner.removesuffix('weight')}{leaf}" for owner in owners for leaf in ("scale", "absmax", "nested")}
    scales |= {name for name in stored if name.rpartition(".")[0] in owners}  # of bitsandbytes
    return {name: FLOATING[kind] for name, kind in stored.items() if kind in FLOATING and name not in scales}
