"""The weights of a model's files by the names that the model gives them, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lorakeet.base.checkpoint_files import check_folder
from lorakeet.base.source import find_source, local_folder
from lorakeet.base.storage import tensor_places


@dataclass(frozen=True)
class StoredWeights:
    """The tensors in the files of one model.

    Attributes:
        folder: The model's folder.
        skeleton: The model without weights.
    """

    folder: Path
    skeleton: Any

    @cached_property
    def places(self) -> dict[str, tuple[Path, str]]:
        """File and key of each tensor, by its name in the model; those that loading converts are left out."""
        return tensor_places(self.folder, self.skeleton)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by the files' headers alone."""
        found = {}
        for name, (file, key) in self.places.items():
            with safe_open(file, framework="pt") as opened:
                found[name] = tuple(opened.get_slice(key).get_shape())
        return found

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        file, key = self.places[name]
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)


def stored_weights(model: str, skeleton: Any) -> StoredWeights:
    """Return the weights of a folder, hub id or GGUF file.

    Args:
        model: The reference, as the user wrote it.
        skeleton: The model without weights.

    Raises:
        BaseModelError: There is no such model, or its files are damaged.
    """
    folder = local_folder(find_source(model))
    check_folder(folder, model)
    return StoredWeights(folder, skeleton)
