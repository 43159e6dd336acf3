"""Consumers of exported adapters, by their documented rules: the update ΔW that each would apply to a layer."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from torch import Tensor

#: Settings that vLLM's PEFTHelper reads; all other keys are ignored.
_VLLM_KEYS = ("r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora")


def vllm_updates(folder: Path, max_rank: int = 512) -> dict[str, Tensor]:
    """Return ΔW by name as vLLM's ``PEFTHelper`` and ``LoRAModel.from_local_checkpoint`` do."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config = {key: config[key] for key in _VLLM_KEYS}
    assert not config["use_dora"] and config["bias"] == "none" and config["r"] <= max_rank
    assert not set(config["modules_to_save"] or ()) - {"classifier", "score"}
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    return _pairs(load_file(folder / "adapter_model.safetensors"), config["r"], scale)


def _pairs(tensors: dict[str, Tensor], rank: int, scale: float) -> dict[str, Tensor]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B|embedding_A|embedding_B)(\.weight)?", key)
        if match is None:
            assert key.rpartition(".")[0].endswith(("base_layer", "score", "classifier")), key
            continue
        found.setdefault(match[1], {})[match[2][-1]] = tensor
    assert all(len(pair["A"]) == rank == pair["B"].shape[1] for pair in found.values())
    return {name: scale * pair["B"] @ pair["A"] for name, pair in found.items()}


def mlx_updates(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Return ΔW by name as mlx-lm's ``load_adapters`` does, for the modules ``names`` of its model."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    settings, tensors = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    inner = {name: re.sub(r"^model\.layers\.\d+\.", "", name) for name in names}
    adapted = [name for name in names if {name, inner[name]} & set(settings["keys"])]
    assert {key.rpartition(".")[0] for key in tensors} <= set(adapted)
    updates = {}
    for name in adapted:
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if a is not None and b is not None:
            assert a.shape[1] == len(b) == settings["rank"]
            updates[name] = (settings["scale"] * a @ b).T
    return updates


def gguf_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a GGUF file by name, in fp32."""
    reader = GGUFReader(path)
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


def gguf_fields(path: Path) -> dict[str, Any]:
    """Return the keys of a GGUF file."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def gguf_updates(path: Path) -> dict[str, Tensor]:
    """Return ΔW by llama.cpp's names of the weights, as its ``llama_adapter_lora_weight`` scales them."""
    fields, tensors = gguf_fields(path), gguf_tensors(path)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    updates = {}
    for name in {key.rpartition(".lora_")[0] for key in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = fields["adapter.lora.alpha"] / b.shape[1]
        updates[name] = scale * (a @ b.T if name == "token_embd.weight" else b @ a)
    return updates
