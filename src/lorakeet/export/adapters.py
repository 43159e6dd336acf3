"""Adapters in the files of other tools: PEFT's, which vLLM reads too, and those of mlx-lm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lorakeet.adapter.model_card import write_card
from lorakeet.adapter.serialization import OWN_NAME, WEIGHTS_NAME
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.errors import AdapterError
from lorakeet.export.plain import MERGE_HINT, PlainLayer
from lorakeet.files import write_json
from lorakeet.lora.config import CONFIG_NAME, LoraConfig, PeftConfig
from lorakeet.lora.interop.peft_methods import tensors_as_method
from lorakeet.rank.resize import copy_others

#: Names of the weights of an adapter of mlx-lm.
MLX_WEIGHTS = "adapters.safetensors"
#: Names of a layer's A and B in PEFT's file: of a linear layer, and of an embedding.
_ENDS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}


def write_peft(
    folder: Path, adapter: str, config: PeftConfig, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    """Write an adapter in PEFT's format, with the tokenizer and the further files of the one it was made from.

    Args:
        folder: Folder to fill.
        adapter: Folder or hub id of the adapter that it was made from.
        config: Its settings.
        tensors: Its tensors, by the keys of LoRA.
        notes: Contents of ``lorakeet.json``.
    """
    copy_others(adapter, folder)
    named = tensors_as_method(tensors, config.variant.parameters)
    save_file({key: tensor.contiguous() for key, tensor in named.items()}, folder / WEIGHTS_NAME, {"format": "pt"})
    config.save_pretrained(folder)
    write_json(folder / OWN_NAME, dict(notes))
    write_card(folder, config, notes)


def plain_config(config: PeftConfig, rank: int) -> LoraConfig:
    """Return the settings of plain LoRA of one rank with s = 1, for the layers of an adapter."""
    neutral = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    values = {**config.to_dict(), **config.variant.settings, **neutral, "r": rank, "lora_alpha": rank}
    return LoraConfig.from_dict(values)


def peft_tensors(
    layers: Sequence[PlainLayer], tensors: Mapping[str, Tensor], variant: Sequence[str]
) -> dict[str, Tensor]:
    """Return plain layers by PEFT's keys, and the tensors of the adapter that are no part of a layer.

    Args:
        layers: The layers, of one rank.
        tensors: The tensors of the adapter that they were made from.
        variant: Names of the tensors of its variant, which the plain layers replace.
    """
    known = (*_ENDS[False], *_ENDS[True], *variant)
    made = {key: tensor for key, tensor in tensors.items() if not key.endswith(known)}
    for layer in layers:
        for end, tensor in zip(_ENDS[layer.embedding], (layer.A, layer.B), strict=True):
            made[f"{PREFIX}{layer.name}.{end}"] = tensor
    return made


def write_mlx(folder: Path, adapter: str, layers: Sequence[PlainLayer], config: Any, base: str | None) -> None:
    """Write an adapter for mlx-lm: A [in, r] and B [r, out] by its names, and its ``adapter_config.json``.

    mlx-lm makes an adapter for every layer that has one of ``keys`` in its name. In those that the file does not name B is
    zero.

    Args:
        folder: Folder to fill.
        adapter: Folder or hub id of the adapter that it was made from.
        layers: The layers, of one rank.
        config: The configuration of the base.
        base: Public name of the base.

    Raises:
        AdapterError: An end of the model is adapted that is tied to the other one.
    """
    tied = [one.name for one in layers if one.kind in ("embed_tokens", "lm_head") and config.tie_word_embeddings]
    if tied:
        raise AdapterError(f"{tied[0]} is tied to the other end of the model, which mlx-lm cannot part", MERGE_HINT)
    copy_others(adapter, folder)
    tensors = {}
    for layer in layers:
        tensors[f"{layer.name}.lora_a"], tensors[f"{layer.name}.lora_b"] = (
            layer.A.T.contiguous(),
            layer.B.T.contiguous(),
        )
    save_file(tensors, folder / MLX_WEIGHTS, {"format": "mlx"})
    keys = sorted({re.sub(r"^model\.layers\.\d+\.", "", layer.name) for layer in layers})
    parameters = {"rank": layers[0].rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    settings = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters, "model": base}
    write_json(folder / CONFIG_NAME, settings)
