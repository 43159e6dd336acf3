"""Agreement of all processes: the same settings, data and weights, or one error in all of them that names the difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorakeet._version import __version__
from lorakeet.config import RunConfig
from lorakeet.errors import TrainingError

#: Differences and names that a message shows of a longer list.
SHOWN = 4


def processes() -> int:
    """Return the number of processes that have joined each other."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def of_all_processes(value: Any) -> list[Any]:
    """Return the values of all processes, by their number."""
    return [value] if processes() == 1 else list(gather_object([value]))


def in_any_process(holds: bool) -> bool:
    """Whether something holds in any process; all get the same answer."""
    return any(of_all_processes(holds))


def settings_facts(config: RunConfig) -> dict[str, str]:
    """Return the settings of a run and the versions that it uses, by name, to be compared."""
    settings = {"out": config.out}
    for section, values in config.model_dump(mode="json", exclude={"out"}).items():
        settings |= {f"{section}.{name}": str(value) for name, value in values.items()}
    versions = {"lorakeet": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return settings | {f"the version of {name}": version for name, version in versions.items()}


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Check that facts are the same in all processes.

    Raises:
        TrainingError: They differ; all processes raise it, with every difference from the first process.
    """
    if processes() == 1:
        return
    first, *others = gather_object([dict(facts)])
    differences = [
        f"{name} is {first.get(name, 'not set')} in process 0 and {other.get(name, 'not set')} in process {rank}"
        for rank, other in enumerate(others, start=1)
        for name in dict.fromkeys([*first, *other])
        if first.get(name) != other.get(name)
    ]
    if differences:
        raise TrainingError(
            f"the processes do not train the same: {_some(differences)}",
            "give every process the same command, files and versions",
        )


def check_same_weights(model: nn.Module) -> None:
    """Check that every parameter has the same bits in all processes; those that are sharded are left out.

    Raises:
        TrainingError: Some differ; all processes raise it.
    """
    if processes() == 1:
        return
    whole = {name: p for name, p in model.named_parameters() if not (isinstance(p, DTensor) or p.is_meta)}
    sums = {name: _checksum(parameter) for name, parameter in whole.items()}
    first, *others = gather_object([sums])
    differ = [name for name in first if any(other.get(name) != first[name] for other in others)]
    if differ or any(first.keys() != other.keys() for other in others):
        raise TrainingError(
            f"{len(differ)} weights differ between processes before the first step: {_some(differ)}",
            "load the same files in every process, and set the same seed before the adapter is made",
        )


@torch.no_grad()
def _checksum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits, read as integers."""
    plain = tensor.detach().contiguous().reshape(-1)
    size = next(n for n in (4, 2, 1) if plain.nbytes % n == 0)
    kind = {4: torch.int32, 2: torch.int16, 1: torch.int8}[size]
    return int(plain.view(torch.int8).view(kind).sum(dtype=torch.int64))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "; ".join(names[:SHOWN]) + more
