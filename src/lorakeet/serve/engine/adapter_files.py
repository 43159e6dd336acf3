"""Files of an adapter to be served: read once, into memory, and checked as far as that goes without the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.adapter.serialization import read_notes, read_tensors
from lorakeet.adapter.tensor_checks import check_ranks, check_trained
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
    """

    source: str
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]
    digest: str


def read_adapter(source: str, task: Task) -> AdapterFiles:
    """Read and check an adapter's files.

    Args:
        source: Folder or hub id.
        task: Task of the model that will serve it.

    Raises:
        AdapterError: They are missing or damaged; the adapter is untrained, for another task, or trained the base's biases.
    """
    config, notes = PeftConfig.from_pretrained(source), read_notes(source)
    # the file is mapped into memory: a write into it would change the tensors
    tensors = {key: tensor.clone() for key, tensor in read_tensors(source).items()}
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
    return AdapterFiles(source, config, tensors, notes, _digest(config, tensors))


def _digest(config: PeftConfig, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        found.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
