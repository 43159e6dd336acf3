"""Files of an adapter to be served: read once, into memory, and checked as far as that goes without the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakeet.adapter.serialization import read_notes, read_tensors
from lorakeet.adapter.tensor_checks import Differences, check_ranks, check_trained, nonfinite_error
from lorakeet.errors import AdapterError
from lorakeet.loaded_model import adapter_task
from lorakeet.lora.config import PeftConfig
from lorakeet.tasks.task import Task


@dataclass(frozen=True)
class AdapterFiles:
    """The content of an adapter's files.

    Attributes:
        source: Folder or hub id.
        config: The settings.
        tensors: The tensors; copies, so a file may be replaced meanwhile.
        notes: The content of ``lorakeet.json``.
        digest: Hash of settings and tensors, of these very values.
        is_finite: Whether no tensor has NaN or infinite values.
    """

    source: str
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]
    digest: str
    is_finite: bool


def read_adapter(source: str, task: Task) -> AdapterFiles:
    """Read and check an adapter's files.

    Args:
        source: Folder or hub id.
        task: Task of the model that will serve it.

    Raises:
        AdapterError: They are missing or damaged; the adapter is untrained, for another task, or trained the base's biases.
    """
    config, notes = PeftConfig.from_pretrained(source), read_notes(source)
    tensors, memory = _copies(read_tensors(source))
    theirs = adapter_task(source, config)
    if theirs.name != task.name:
        raise AdapterError(
            f"adapter {source!r} is for {theirs.name}, this model for {task.name}", "serve it on a base of its own"
        )
    if config.bias != "none":
        raise AdapterError(
            f"adapter {source!r} trained the biases of the base (bias={config.bias!r}), which others share",
            "train with bias='none', or serve the merged model",
        )
    check_ranks(config, tensors, source)
    check_trained(tensors, source)
    is_finite = all(map(_is_finite, memory))
    return AdapterFiles(source, config, tensors, notes, _digest(config, tensors, memory), is_finite)


def _copies(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return copies of tensors, by key, and the memory that they lie in: a tensor for each dtype.

    The file is mapped into memory, where a write into it would change the tensors. Few large operations leave Python to
    others, so that streams of answers go on meanwhile.
    """
    copies: dict[str, Tensor] = {}
    memory: list[Tensor] = []
    for dtype in sorted({tensor.dtype for tensor in tensors.values()}, key=str):
        chosen = {key: tensors[key] for key in sorted(tensors) if tensors[key].dtype == dtype}
        memory.append(torch.cat([tensor.reshape(-1) for tensor in chosen.values()]))
        parts = memory[-1].split([tensor.numel() for tensor in chosen.values()])
        copies |= {key: part.view(tensor.shape) for (key, tensor), part in zip(chosen.items(), parts, strict=True)}
    return {key: copies[key] for key in tensors}, memory


def _is_finite(flat: Tensor) -> bool:
    """Whether no value is NaN or infinite; in one thread, as steps of the engine have the others."""
    wide = flat if flat.dtype == torch.float64 else flat.float()
    return bool(np.isfinite(wide.numpy()).all())


def _digest(config: PeftConfig, tensors: Mapping[str, Tensor], memory: Sequence[Tensor]) -> str:
    found = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    shapes = [f"\n{key} {tensors[key].dtype} {list(tensors[key].shape)}" for key in sorted(tensors)]
    found.update("".join([*shapes, "\n"]).encode())
    for flat in memory:
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def differences(expected: Mapping[str, list[int]], tensors: Mapping[str, Tensor], is_finite: bool) -> Differences:
    """Compare the tensors of a file with the shapes that its places expect.

    Args:
        expected: The shapes, by key.
        tensors: The tensors.
        is_finite: Whether all their values are finite.
    """
    shapes = [
        f"{key} is {list(tensors[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in tensors and list(tensors[key].shape) != shape
    ]
    return Differences(
        {},
        tuple(sorted(expected.keys() - tensors.keys())),
        tuple(sorted(tensors.keys() - expected.keys())),
        tuple(shapes),
        nonfinite=None if is_finite else nonfinite_error(tensors),
    )
