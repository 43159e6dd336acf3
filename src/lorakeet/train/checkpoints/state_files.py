"""State of a training as safetensors and JSON: containers, numbers, texts and tensors, and nothing that runs code.

``NAME.json`` holds the nested state, ``NAME.safetensors`` its tensors. What JSON has no form for is an object with one
key: ``$tensor`` and ``$array`` (a name in the other file), ``$tuple``, ``$dict`` (pairs) and ``$float`` (not finite).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet.errors import TrainingError
from lorakeet.security.paths import exists


def write_state(folder: Path, name: str, state: Any) -> None:
    """Write a nested state as ``NAME.json`` and, if there are tensors in it, ``NAME.safetensors``.

    Raises:
        TrainingError: A value has a type that only a pickle could hold; the message says where it is.
    """
    tensors: dict[str, Tensor] = {}
    encoded = _encode(state, name, tensors, {})
    if tensors:
        save_file(_separate(tensors), folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(encoded, allow_nan=False) + "\n", encoding="utf-8")


def read_state(folder: Path, name: str) -> Any:
    """Read a state that :func:`write_state` wrote; tensors are on the CPU.

    Raises:
        TrainingError: The files are damaged.
    """
    try:
        encoded = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        file = folder / f"{name}.safetensors"
        return _decode(encoded, load_file(file) if exists(file) else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise TrainingError(
            f"{folder / name}.json cannot be read, expected the state of a training: {error}",
            "resume from an earlier checkpoint",
        ) from error


def _encode(value: Any, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """Return ``value`` as JSON can hold it, with its tensors in ``tensors``; equal objects share one tensor.

    Args:
        value: A part of the state.
        path: Its place in the state, for names of tensors and for messages.
        tensors: Tensors found so far, by name.
        names: Name of each tensor, by its ``id``.
    """
    value = value.item() if isinstance(value, np.generic) else value
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _encode_tensor(value, path, tensors, names)
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}.{i}", tensors, names) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        pairs = [(key, _encode(item, f"{path}.{key}", tensors, names)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": [[_encode(key, f"{path} key", tensors, names), item] for key, item in pairs]}
    raise TrainingError(
        f"{path} of the training's state is a {kind.__name__}, expected numbers, texts, tensors and containers of them",
        "choose another optimizer or schedule, or save nothing: save_strategy='no'",
    )


def _encode_tensor(value: Any, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> dict[str, str]:
    """Put a tensor or array into ``tensors``; return the reference to it."""
    if isinstance(value, Tensor) and type(value) not in (Tensor, torch.nn.Parameter):
        raise TrainingError(
            f"{path} of the training's state is a {type(value).__name__}, expected a plain tensor",
            "choose another optimizer, or save nothing: save_strategy='no'",
        )
    if id(value) not in names:
        while path in tensors:  # keys 0 and "0", or a key with a dot
            path += "'"
        names[id(value)] = path
        tensors[path] = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(value.copy())
    return {"$tensor" if isinstance(value, Tensor) else "$array": names[id(value)]}


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors that share no memory, which the file format demands."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone(memory_format=torch.contiguous_format) if memory in seen else tensor.contiguous()
        seen.add(memory)
    return result


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state of which ``value`` is the JSON form."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (tag := next(iter(value))).startswith("$"):
        return _DECODERS[tag](value[tag], tensors)
    return {key: _decode(item, tensors) for key, item in value.items()}


#: Tag of an object with one key -> function of its value and the tensors.
_DECODERS: dict[str, Any] = {
    "$float": lambda value, tensors: float(value),
    "$tuple": lambda value, tensors: tuple(_decode(value, tensors)),
    "$dict": lambda value, tensors: {_decode(key, tensors): _decode(item, tensors) for key, item in value},
    "$tensor": lambda value, tensors: tensors[value],
    "$array": lambda value, tensors: tensors[value].numpy(),
}
