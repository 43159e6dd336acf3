"""The number formats that a base is stored in, and writing a model in them.

A base is loaded in the format that it is computed in. That choice belongs to this machine: fp32 on a
CPU, bf16 or fp16 on a GPU. The files of a model made from it must not depend on that, so they have the formats of the
base's own files.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel

from lorakeet.base.checkpoint_files import weight_files
from lorakeet.base.device_dtype import DTYPES, dtype_name
from lorakeet.base.quiet import quiet
from lorakeet.errors import BaseModelError
from lorakeet.kernels.nf4.format import BLOCK
from lorakeet.quant.file_names import FLOATING, NamesInModel, floating_formats
from lorakeet.quant.protocol import is_rounded, quantized_layers
from lorakeet.security.json_file import read_object
from lorakeet.security.paths import is_file

GENERATION_CONFIG = "generation_config.json"
#: Bytes of the scale of each row of a quantized matrix.
SCALE_BYTES = 4


@dataclass(frozen=True)
class StoredFormats:
    """The number format of each floating tensor of a model's files.

    Attributes:
        by_name: Format of a tensor, by its name in the model without adapters.
        common: Format of a tensor that has no entry.
    """

    by_name: Mapping[str, torch.dtype]
    common: torch.dtype

    def of(self, name: str) -> torch.dtype:
        """Return the format of the tensor ``name``."""
        return self.by_name.get(name, self.common)

    def describe(self) -> str:
        """Return the formats by name, the most frequent first, for example ``bf16 and fp32``."""
        counts = Counter(map(dtype_name, self.by_name.values())) or Counter([dtype_name(self.common)])
        return " and ".join(name for name, _ in counts.most_common())


def widest_format(folder: Path) -> torch.dtype:
    """Return the widest number format of the floating tensors in the files of ``folder``; fp32 if there is none."""
    found = {dtype for file in weight_files(folder) for dtype in floating_formats(file).values()}
    return max(found, key=lambda dtype: (dtype.itemsize, torch.finfo(dtype).max), default=torch.float32)


def stored_formats(folder: Path, model: PreTrainedModel) -> StoredFormats:
    """Read the number formats of the files that ``model`` was loaded from, by the names that it gives their tensors."""
    names = NamesInModel(model)
    formats: dict[str, torch.dtype] = {}
    for file in weight_files(folder):
        for key, dtype in sorted(floating_formats(file).items()):
            formats[names.of(key)[0]] = dtype
    return StoredFormats(formats, widest_format(folder))


def tensor_places(folder: Path, model: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """Map the names that ``model`` gives its tensors to their files in ``folder`` and their keys there.

    Tensors that loading makes of others, such as stacked experts, are left out.

    Args:
        folder: Folder of a model.
        model: The model, with weights or without.
    """
    names = NamesInModel(model)
    places = {}
    for file in weight_files(folder):
        for key in floating_formats(file):
            name, converted = names.of(key)
            if not converted:
                places[name] = (file, key)
    return places


def chosen_formats(name: str, model: PreTrainedModel) -> StoredFormats:
    """Return one format for all tensors, except those that the architecture keeps in fp32.

    Args:
        name: A format's name in the settings, such as ``bf16``.
        model: The model to store.
    """
    kept = {*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or () if name == "fp16" else ())}
    names = {key for key in model.state_dict() if any(part in key for part in kept)}
    return StoredFormats(dict.fromkeys(names, torch.float32), DTYPES[name])


def bytes_to_store(
    folder: Path, asked: str | None = None, bits: int | None = None, vocabulary: int | None = None
) -> int:
    """Return the bytes that the weights of a base take in another number format, by its files' headers alone.

    Args:
        folder: Folder of the base.
        asked: Name of the format of floating tensors, such as ``bf16``; None: their own.
        bits: Bits of each value of a matrix; None: those of the format.
        vocabulary: Rows of a matrix that has a row for each token; it has at least 8 bits.
    """
    total = 0
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118 - it is no dict
            for shape, kind in [(part.get_shape(), part.get_dtype()) for part in slices]:
                own = FLOATING.get(kind)
                dtype = own if own is None or asked is None else DTYPES[asked]
                if bits and own is not None and len(shape) == 2:
                    least = max(bits, 8) if shape[0] == vocabulary else bits
                    total += math.prod(shape) * least // 8 + max(shape[0] * SCALE_BYTES, math.prod(shape) // BLOCK)
                else:
                    total += math.prod(shape) * (1 if dtype is None else dtype.itemsize)
    return total


@torch.no_grad()
def store_in(model: PreTrainedModel, formats: StoredFormats) -> None:
    """Convert the floating parameters and buffers of ``model`` to their stored formats, in place.

    The tensors of weights that are rounded stay as they are.
    """
    kept = {
        id(t)
        for _, layer in quantized_layers(model)
        if is_rounded(layer)
        for t in layer.quantized_weight().tensors().values()
    }
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.to(formats.of(name))


def check_generation_config(folder: Path) -> None:
    """Check that the generation config of a base can be read, before the work; its values are the author's own.

    Raises:
        BaseModelError: It is no JSON object.
    """
    file = folder / GENERATION_CONFIG
    try:
        if is_file(file):
            read_object(file)
    except ValueError as error:
        raise BaseModelError(f"{file} is not readable as JSON: {error}", "download it again, or delete it") from error


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path, source: Path) -> None:
    """Write a model and its tokenizer, with the generation config of its base as that was given.

    transformers refuses to save a generation config with a temperature but without ``do_sample``, and a model config with
    settings of generation. Many public models have them, and reading them is no error.

    Args:
        model: A plain model.
        tokenizer: Its tokenizer.
        folder: Folder to write.
        source: Folder of the base.
    """
    own, generation = source / GENERATION_CONFIG, getattr(model, "generation_config", None)
    legacy = model.config._get_generation_parameters()
    for key in legacy:
        delattr(model.config, key)
    try:
        if generation is not None:
            model.generation_config = GenerationConfig()
        with quiet():
            model.save_pretrained(folder)
    finally:
        model.generation_config = generation
        for key, value in legacy.items():
            setattr(model.config, key, value)
    if is_file(own):
        shutil.copyfile(own, folder / GENERATION_CONFIG)
    elif generation is not None and model.can_generate():
        generation.to_json_file(folder / GENERATION_CONFIG, use_diff=True)
    tokenizer.save_pretrained(folder)
