"""An adapter on disk: PEFT's two files, read and written whole, and checked in both directions.

``adapter_config.json`` says how, ``adapter_model.safetensors`` (metadata ``{"format": "pt"}``) holds the tensors,
``lorakeet.json`` is our own: base fingerprint and versions. Other tools ignore it, and we do without it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet._version import __version__
from lorakeet.adapter.fingerprint import fingerprint, mismatch
from lorakeet.adapter.tensor_names import PREFIX, ROWS, mirrored_names, tensor_names, vocabulary_names
from lorakeet.errors import AdapterError, OutputError
from lorakeet.files import PICKLE_SUFFIXES, write_file, write_json
from lorakeet.log import info, warn
from lorakeet.lora.config import find_adapter_file
from lorakeet.lora.model import LoraModel
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.trainable_tokens import TiedLayer, TrainableTokens
from lorakeet.quant.state_dict import has_weight, read_weight, write_weight

WEIGHTS_NAME = "adapter_model.safetensors"
OWN_NAME = "lorakeet.json"


def write_adapter(
    model: LoraModel,
    adapter: str,
    folder: Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write one adapter's files into ``folder``, each whole or not at all.

    Args:
        state_dict: Gathered tensors of a sharded model; left out: the model's own.
        notes: What else ``lorakeet.json`` should say, for example the final losses.

    Raises:
        AdapterError: a tensor has NaN or infinite values; nothing is written then.
        OutputError: the folder cannot be written to.
    """
    if folder.is_file():
        raise OutputError(f"{folder} is a file, expected a folder to save the adapter in")
    source = model.state_dict() if state_dict is None else state_dict
    wanted = tensor_names(model, adapter)
    if why := resized(model, adapter):
        info(why)
        wanted |= vocabulary_names(model)
    tensors = {key: read_weight(model, source, name).detach().cpu().contiguous() for key, name in wanted.items()}
    for key, (first, transposed) in mirrored_names(model, adapter).items():
        if not key.endswith(ROWS):
            tensors[key] = (tensors[first].T if transposed else tensors[first]).contiguous()
    if problems := broken(tensors):
        raise AdapterError(f"adapter {adapter!r} is not saved: {problems}", "lower the learning rate and train again")
    if never_learned(tensors):
        warn(f"adapter {adapter!r} changes nothing: every B is zero. Has it been trained?")
    config = model.peft_config[adapter].model_copy(update={"inference_mode": True})
    with write_file(folder / WEIGHTS_NAME) as aside:
        # safetensors refuses tensors that share memory: a tied head and embedding are written as two copies
        save_file(_unshared(tensors), aside, metadata={"format": "pt"})
    config.save_pretrained(folder)
    base = {"name": config.base_model_name_or_path, "fingerprint": fingerprint(model)}
    write_json(folder / OWN_NAME, {"format": 1, "lorakeet": __version__, "base": base, **(notes or {})})


def resized(model: LoraModel, adapter: str) -> str | None:
    """Why the embedding must be saved with the adapter: it was resized, and its new rows lie nowhere else."""
    asked = (getattr(model, ask, lambda: None)() for ask in ("get_input_embeddings", "get_output_embeddings"))
    layers = [layer for layer in asked if layer is not None]
    file = _base_config(str(getattr(getattr(model, "config", None), "_name_or_path", None) or ""))
    if not layers or file is None:
        return None  # nothing tells what the base's own vocabulary was
    values = json.loads(file.read_text(encoding="utf-8"))
    had, rows = values.get("vocab_size", (values.get("text_config") or {}).get("vocab_size")), layers[0].weight.shape[0]
    if not isinstance(had, int) or had == rows or all(_saves(layer, adapter, range(had, rows)) for layer in layers):
        return None
    return f"the vocabulary has {rows:,} rows and the base's own {had:,}: the embedding is saved with the adapter"


def _base_config(name: str) -> Path | None:
    """The base's own config.json, where it lies on this machine: in its folder, or in the hub's cache."""
    if (Path(name) / "config.json").is_file():
        return Path(name) / "config.json"
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 and not name.startswith(".") else None
    return Path(cached) if isinstance(cached, str) else None


def _saves(layer: Any, adapter: str, rows: range) -> bool:
    """Whether the adapter's file has these rows of an embedding or head without the layer being saved for their sake."""
    if isinstance(layer, SavedModule):
        return adapter in layer.modules_to_save
    first = layer.source if isinstance(layer, TiedLayer) else layer
    if not isinstance(first, TrainableTokens) or adapter not in layer.r:
        return False
    return set(rows) <= set(first.tokens(adapter).tolist())


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    return {
        key: tensor.clone() if (at := tensor.data_ptr()) in seen or seen.add(at) else tensor  # type: ignore[func-returns-value]
        for key, tensor in tensors.items()
    }


def read_tensors(name: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> dict[str, Tensor]:
    """The tensors of the adapter ``name`` (folder or hub id), on the CPU.

    Raises:
        AdapterError: there is no safetensors file, only a pickle; or the file is damaged.
    """
    path = find_adapter_file(name, WEIGHTS_NAME, revision=revision, subfolder=subfolder)
    if path is None:
        folder = Path(name) / (subfolder or "")
        pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES)
        if pickles or find_adapter_file(name, "adapter_model.bin", revision=revision, subfolder=subfolder):
            raise AdapterError(
                f"{name} holds its weights as a pickle ({', '.join(pickles) or 'adapter_model.bin'}), which may run "
                "code when opened; expected safetensors",
                "convert it where you trust it: load it with its own tool and save_pretrained(safe_serialization=True)",
            )
        raise AdapterError(f"{name} holds no {WEIGHTS_NAME}", "give the folder that save_pretrained wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} is damaged or no safetensors file ({error})", "copy it again; was the transfer complete?"
        ) from None


def read_notes(name: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> dict[str, Any]:
    """What ``lorakeet.json`` says; empty if another tool made the adapter.

    Raises:
        AdapterError: the file is there and is no JSON object.
    """
    path = find_adapter_file(name, OWN_NAME, revision=revision, subfolder=subfolder)
    try:
        notes = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}", "copy the adapter again, or delete this file") from None
    if not isinstance(notes, dict):
        raise AdapterError(f"{path} holds a {type(notes).__name__}, expected a JSON object", "delete this file")
    return notes


def check_base(name: str | Path, notes: Mapping[str, Any], model: LoraModel) -> None:
    """Refuse a base that is not the one the adapter was trained on.

    Raises:
        AdapterError: with both names.
    """
    base = notes.get("base") or {}
    why = mismatch(base["fingerprint"], model) if base.get("fingerprint") else None
    if why:
        here = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        raise AdapterError(
            f"adapter {str(name)!r} was trained on {base.get('name')!r}, this base is {here!r}: {why}",
            "load the base it was trained on; allow_other_base=True (--allow-other-base) goes on all the same",
        )


def put_tensors(
    model: LoraModel, adapter: str, tensors: Mapping[str, Tensor], name: str | Path, *, allow_untrained: bool = False
) -> None:
    """Check the tensors against the adapter that ``model`` expects, all complaints at once, then copy them in.

    Raises:
        AdapterError: a tensor is missing, unexpected, mis-shaped or not finite, or the adapter never learned.
    """
    wanted, state = tensor_names(model, adapter), model.state_dict()
    missing = sorted(key for key in set(wanted) - set(tensors) if not key.endswith(".base_layer.weight"))
    wanted = {key: own for key, own in wanted.items() if key in tensors or key in missing}
    wanted |= {key: own for key, own in vocabulary_names(model).items() if key in tensors}
    mirrored = mirrored_names(model, adapter)
    unexpected = sorted(key for key in set(tensors) - set(wanted) - set(mirrored) if not _redundant(key))
    shapes = [
        f"{key} is {list(tensors[key].shape)}, expected {list(state[own].shape)}"
        for key, own in wanted.items()
        if key in tensors and tensors[key].shape != state[own].shape
    ]
    untied = [] if shapes else _untied(wanted, mirrored, tensors, state)
    kinds = {
        "missing tensors": missing,
        "unexpected tensors": unexpected,
        "wrong shapes": shapes,
        "layers that share their weight here, with tensors that differ": untied,
    }
    complaints = [f"{what} ({len(items)}): {', '.join(items)}" for what, items in kinds.items() if items]
    if problems := broken(tensors):
        complaints.append(problems)
    if complaints:
        rows = next((len(tensors[key]) for key in vocabulary_names(model) if key in tensors), None)
        resize = f"the base's vocabulary was resized: model.resize_token_embeddings({rows}) before loading the adapter"
        raise AdapterError(
            f"adapter {str(name)!r} does not fit this model: {'; '.join(complaints)}",
            resize
            if shapes and rows
            else "is it the right base, and the adapter_config.json that belongs to the tensors?",
        )
    if never_learned(tensors):
        message = f"adapter {str(name)!r} never learned: every B is zero, so it changes nothing"
        if not allow_untrained:
            raise AdapterError(message, "train it; allow_untrained=True loads it all the same")
        warn(message)
    vocabulary = vocabulary_names(model)
    with torch.no_grad():
        for key, own in wanted.items():
            of_base = own.endswith(".base_layer.weight") or key in vocabulary
            if of_base and has_weight(model, state, own, tensors[key]):
                continue
            if of_base:
                info(f"{key.removeprefix(PREFIX)} is taken from the adapter: it differs from the base's")
            write_weight(model, state, own, tensors[key])


def _untied(
    wanted: Mapping[str, str],
    mirrored: Mapping[str, tuple[str, bool]],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> list[str]:
    """Keys whose tensors would go into one parameter, or into one and its mirror, and are not the same."""
    found: list[str] = []
    first_of: dict[tuple[int, torch.Size], str] = {}
    for key, own in wanted.items():
        if key not in tensors:
            continue
        first = first_of.setdefault((state[own].data_ptr(), state[own].shape), key)
        if state[own].numel() and not torch.equal(tensors[key], tensors[first]):
            found.append(f"{first} and {key}")
    for key, (first, transposed) in mirrored.items():
        if key in tensors and first in tensors:
            other = tensors[first].T if transposed else tensors[first]
            found += [] if torch.equal(tensors[key], other) else [f"{first} and {key}"]
    return found


def _redundant(key: str) -> bool:
    """Copies that PEFT writes of biases which are in the file under their own names too."""
    return key.endswith((".original_module.bias", ".modules_to_save.bias"))


def broken(tensors: Mapping[str, Tensor]) -> str | None:
    """A sentence that names the tensors with NaN or infinite values; None if all are finite."""
    names = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    return f"NaN or infinite values in {len(names)} tensors: {', '.join(sorted(names)[:5])}" if names else None


def never_learned(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the low-rank pairs cannot change anything: in each, A or B is all zero (and nothing else was trained)."""
    pairs: dict[str, bool] = {}
    for key, tensor in tensors.items():
        if ".lora_" not in key:
            if not key.endswith(".base_layer.weight"):
                return False  # a module trained whole, or biases: judged by the user's own eyes
            continue
        layer = key.rpartition(".lora_")[0]
        dead = not key.endswith(".bias") and not bool(tensor.any())
        pairs[layer] = pairs.get(layer, False) or dead
    return bool(pairs) and all(pairs.values())
