"""Write and read an adapter's files: PEFT's two and our own, each whole, checked in both directions.

``adapter_config.json`` has the settings and ``adapter_model.safetensors`` (metadata ``{"format": "pt"}``) the tensors.
``lorakeet.json`` is our own, with the base's fingerprint and versions. Other tools ignore it, and Lorakeet can do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from pydantic import BaseModel, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet._version import __version__
from lorakeet.adapter.fingerprint import fingerprint, mismatch
from lorakeet.adapter.model_card import write_card
from lorakeet.adapter.older_names import CurrentNames
from lorakeet.adapter.tensor_checks import is_untrained, nonfinite_error
from lorakeet.adapter.tensor_names import is_token_rows, mirrored_names, tensor_names, vocabulary_names
from lorakeet.adapter.unfrozen import NOTE, unfrozen_keys, unfrozen_names
from lorakeet.config import TaskName
from lorakeet.errors import AdapterError, OutputError
from lorakeet.facts.vocabulary import embedding_rows, vocabulary_size
from lorakeet.files import PICKLE_SUFFIXES, write_file, write_json
from lorakeet.log import info, warn
from lorakeet.lora.algebra.singular_values import fold_singular_values
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.conversion import to_plain_lora
from lorakeet.lora.initialization.taken_part import holds_parts
from lorakeet.lora.interop.peft_methods import tensors_as_lora, tensors_as_method
from lorakeet.lora.interop.wrappers import canonical, state_of
from lorakeet.lora.lifecycle.adapter_files import find_adapter_file
from lorakeet.lora.model import LoraModel
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.trainable_tokens import TiedLayer, TrainableTokens
from lorakeet.quant.state_dict import read_weight
from lorakeet.security.json_file import JsonError, read_object
from lorakeet.security.paths import is_file

WEIGHTS_NAME = "adapter_model.safetensors"
#: Number formats of an adapter's tensors; the integers are those of counters and quantized weights.
DTYPES = frozenset(
    (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
)
OWN_NAME = "lorakeet.json"


def write_adapter(
    model: LoraModel,
    adapter: str,
    folder: Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    initial: Mapping[str, Tensor] | None = None,
    plain_lora: bool = False,
) -> PeftConfig:
    """Write one adapter's files into ``folder``, each whole or not at all; returns the settings that the file has.

    Args:
        model: A model that has the adapter.
        adapter: The adapter's name.
        folder: Made if it does not exist.
        state_dict: Gathered tensors of a sharded model; left out: the model's own.
        notes: Further facts for ``lorakeet.json``, for example the final losses.
        save_embedding_layers: As in :func:`adapter_tensors`.
        initial: The adapter's tensors before its training: it is written as plain LoRA on the whole base.
        plain_lora: Whether to write plain LoRA where it says the same.

    Raises:
        AdapterError: a tensor has NaN or infinite values; nothing is written then.
        OutputError: the folder cannot be written to.
    """
    if is_file(folder):
        raise OutputError(f"{folder} is a file, expected a folder to save the adapter in")
    source = state_of(model, state_dict)
    unfrozen = unfrozen_names(model)
    raw = adapter_tensors(model, adapter, state_dict, save_embedding_layers)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in raw.items()}
    config = model.peft_config[adapter].as_made().model_copy(update={"inference_mode": True})
    if initial is not None:
        config, tensors = to_plain_lora(config, tensors, initial)
    elif plain_lora:
        config, tensors = fold_singular_values(config, tensors)
    if error := nonfinite_error(tensors):
        raise AdapterError(f"adapter {adapter!r} is not saved: {error}", "lower the learning rate and train again")
    if is_untrained(tensors):
        warn(f"adapter {adapter!r} changes nothing: every B is zero. Has it been trained?")
    with write_file(folder / WEIGHTS_NAME) as aside:
        # safetensors refuses tensors that share memory: a tied head and embedding are written as two copies
        save_file(_unshared(tensors_as_method(tensors, config.variant.parameters)), aside, metadata={"format": "pt"})
    config.save_pretrained(folder)
    base = {"name": config.base_model_name_or_path, "fingerprint": fingerprint(model, source, leave_out=unfrozen)}
    further: dict[str, Any] = {NOTE: sorted(map(canonical, unfrozen))} if unfrozen else {}
    if initial is None and holds_parts(model, adapter):
        further["on_residual"] = True
    write_json(folder / OWN_NAME, {"format": 1, "lorakeet": __version__, "base": base, **further, **(notes or {})})
    return config


def adapter_tensors(
    model: LoraModel,
    adapter: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """Return the tensors of one adapter by the keys of its file; they share memory with the model.

    Args:
        model: A model that has the adapter.
        adapter: The adapter's name.
        state_dict: Gathered tensors of a sharded model; left out: the model's own.
        save_embedding_layers: Whether to add the embedding and the head; ``auto``: if they are adapted or were resized.
    """
    source = state_of(model, state_dict)
    names = tensor_names(model, adapter) | unfrozen_keys(model, unfrozen_names(model))
    if save_embedding_layers is False:
        names = {key: name for key, name in names.items() if not key.endswith(".base_layer.weight")}
    elif save_embedding_layers is True:
        names |= vocabulary_names(model)
    elif reason := resize_reason(model, adapter):
        info(reason)
        names |= vocabulary_names(model)
    if lost := sorted(key for key, name in names.items() if name not in source):
        raise AdapterError(
            f"adapter {adapter!r} is not saved: the model has no tensor {lost[0]} ({len(lost)} are missing)",
            "save it before another tool replaces its layers, and give a whole state dict",
        )
    tensors = {key: read_weight(model, source, name) for key, name in names.items()}
    for key, (first, transposed) in mirrored_names(model, adapter).items():
        if not is_token_rows(key):
            tensors[key] = tensors[first].T if transposed else tensors[first]
    return tensors


def add_notes(folder: Path, config: PeftConfig, notes: Mapping[str, Any]) -> None:
    """Add facts to the ``lorakeet.json`` of a saved adapter, and write its model card again; the weights stay.

    Args:
        folder: Where the adapter was saved.
        config: The adapter's settings.
        notes: Facts to add, for example the final losses.

    Raises:
        OutputError: the folder cannot be written to.
    """
    both = {**read_notes(folder), **notes}
    write_json(folder / OWN_NAME, both)
    write_card(folder, config, both)


def resize_reason(model: LoraModel, adapter: str) -> str | None:
    """Return why the embedding must be saved with the adapter: it was resized, and no other file has the new rows."""
    methods = ("get_input_embeddings", "get_output_embeddings")
    layers = [layer for method in methods if (layer := getattr(model, method, lambda: None)()) is not None]
    file = _base_config(str(getattr(getattr(model, "config", None), "_name_or_path", None) or ""))
    if not layers or file is None:
        return None  # the base's own vocabulary is unknown
    try:
        values = read_object(file)
    except (JsonError, OSError):
        return None
    original, rows = vocabulary_size(values), embedding_rows(model)
    if original is None or rows is None or original == rows:
        return None
    if all(_saves(layer, adapter, range(original, rows)) for layer in layers):
        return None
    return f"the vocabulary has {rows:,} rows, the base's own {original:,}: the embedding is saved with the adapter"


def _base_config(name: str) -> Path | None:
    """Return the base's own config.json if it is on this machine: in its folder, or in the hub's cache."""
    if is_file(Path(name) / "config.json"):
        return Path(name) / "config.json"
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 and not name.startswith(".") else None
    return Path(cached) if isinstance(cached, str) else None


def _saves(layer: Any, adapter: str, rows: range) -> bool:
    """Whether the adapter's file has these rows of an embedding or head even if the layer itself is not saved."""
    if isinstance(layer, SavedModule):
        return adapter in layer.modules_to_save
    first = layer.source if isinstance(layer, TiedLayer) else layer
    if not isinstance(first, TrainableTokens) or adapter not in layer.r:
        return False
    return set(rows) <= set(first.tokens(adapter).tolist())


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that begin at the memory of an earlier one."""
    seen: set[int] = set()
    unshared = {}
    for key, tensor in tensors.items():
        unshared[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return unshared


def read_tensors(name: str | Path, **where: Any) -> dict[str, Tensor]:
    """Read the tensors of the adapter ``name`` (folder or hub id), on the CPU; ``where``: see :func:`find_adapter_file`.

    Raises:
        AdapterError: there is no safetensors file, only a pickle; or the file is damaged.
    """
    path = find_adapter_file(name, WEIGHTS_NAME, **where)
    if path is None:
        folder = Path(name) / (where.get("subfolder") or "")
        pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES)
        if pickles or find_adapter_file(name, "adapter_model.bin", **where):
            raise AdapterError(
                f"{name} has its weights in a pickle ({', '.join(pickles) or 'adapter_model.bin'}), which may run "
                "code when opened; expected safetensors",
                "if you trust it, load it with its own tool and save_pretrained(safe_serialization=True)",
            )
        raise AdapterError(f"{name} has no {WEIGHTS_NAME}", "give the folder that save_pretrained wrote")
    try:
        tensors = tensors_as_lora({canonical(key): tensor for key, tensor in load_file(path).items()})
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError, MemoryError) as error:
        raise AdapterError(
            f"{path} is damaged or not a safetensors file ({error})", "copy it again; was the transfer complete?"
        ) from None
    if strange := [key for key, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        formats = ", ".join(sorted({str(tensors[key].dtype).removeprefix("torch.") for key in strange}))
        raise AdapterError(f"{path} has tensors of format {formats}, such as {strange[0]}", "convert them to float32")
    return tensors


class _Fingerprint(BaseModel):
    """Fingerprint of a base, as :func:`lorakeet.adapter.fingerprint.fingerprint` makes it."""

    architecture: str
    shapes: str
    values: dict[str, list[float]]


class _BaseNotes(BaseModel):
    """The base in the notes."""

    name: str | None = None
    fingerprint: _Fingerprint | None = None


class _TaskNotes(BaseModel):
    """The task in the notes, as :meth:`lorakeet.tasks.task.Task.notes` makes it."""

    type: TaskName
    problem: Literal["single_label", "multi_label", "regression"] | None = None
    labels: list[str] | None = None

    @field_validator("type")
    @classmethod
    def _is_concrete(cls, name: str) -> str:
        if name == "auto":
            raise ValueError("a task by name, not auto")
        return name


class _Notes(BaseModel):
    """The entries of ``lorakeet.json`` that are read again; all others may be anything."""

    base: _BaseNotes | None = None
    task: _TaskNotes | None = None
    unfrozen: list[str] | None = None
    on_residual: bool = False


def read_notes(name: str | Path, **where: Any) -> dict[str, Any]:
    """Read ``lorakeet.json``; empty if another tool made the adapter. ``where``: see :func:`find_adapter_file`.

    Raises:
        AdapterError: the file is not a JSON object, or an entry is not what Lorakeet writes.
    """
    path = find_adapter_file(name, OWN_NAME, **where)
    try:
        notes = read_object(path) if path else {}
        _Notes.model_validate(notes)
    except (JsonError, OSError) as error:
        raise AdapterError(f"{path} is not JSON: {error}", "copy the adapter again, or delete this file") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise AdapterError(
            f"{path} has {'.'.join(map(str, first['loc']))} of another form: {first['msg'].lower()}",
            "copy the adapter again, or delete this file",
        ) from None
    return notes


def check_base(name: str | Path, notes: Mapping[str, Any], model: LoraModel) -> None:
    """Refuse a base that is not the one the adapter was trained on.

    Raises:
        AdapterError: with both names.
    """
    base = notes.get("base") or {}
    difference = (
        mismatch(base["fingerprint"], model, CurrentNames(model).parameter) if base.get("fingerprint") else None
    )
    if difference:
        here = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        raise AdapterError(
            f"adapter {str(name)!r} was trained on {base.get('name')!r}, this base is {here!r}: {difference}",
            "load the base it was trained on; allow_other_base=True (--allow-other-base) accepts this one",
        )
