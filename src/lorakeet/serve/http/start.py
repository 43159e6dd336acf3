"""Start of a service: the base, its adapters and the engine, out of settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lorakeet.config import BaseSettings, TaskName
from lorakeet.errors import AdapterError, ConfigError
from lorakeet.kernels.cpu.build import library
from lorakeet.loaded_model import adapter_task, open_model, settings_of_base
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.lifecycle.adapter_files import CONFIG_NAME
from lorakeet.runs.process_memory import share_one_heap
from lorakeet.security.paths import is_dir, is_file, outside
from lorakeet.serve.compiled import compiled_forward
from lorakeet.serve.compiled.agreement import agreement_of
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.residents import Residents
from lorakeet.serve.http.access.keys import Keys
from lorakeet.serve.http.service import Limits, Service
from lorakeet.tasks.task import Task


@dataclass(frozen=True)
class Served:
    """Models that a server begins with.

    Attributes:
        folder: Folder with a folder for each adapter; None: none.
        named: Folder of each further adapter, by name.
        base_name: Name of the base for callers; None: its id, or the name of its folder.
        task: Task of the model; auto: that of the first adapter, or else CAUSAL_LM.
        allow_hub: Whether admins may load adapters from the hub.
    """

    folder: Path | None = None
    named: Mapping[str, Path] = field(default_factory=dict)
    base_name: str | None = None
    task: TaskName = "auto"
    allow_hub: bool = False

    def adapters(self) -> dict[str, Path]:
        """Return the folder of each adapter by name.

        Raises:
            ConfigError: Two of them have one name.
        """
        found = {} if self.folder is None else adapters_in(self.folder)
        if twice := sorted(found.keys() & self.named.keys()):
            raise ConfigError(f"two adapters have the name {twice[0]!r}", "give one of them another name")
        return {**found, **self.named}


def adapters_in(folder: Path) -> dict[str, Path]:
    """Return the adapters in a folder by name; links that lead out of it are left out."""
    paths = sorted(path for path in folder.iterdir() if is_dir(path) and not outside(folder, path.name))
    return {path.name: path.absolute() for path in paths if is_file(path / CONFIG_NAME)}


def open_service(
    settings: BaseSettings,
    served: Served,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    engine: Mapping[str, Any] | None = None,
) -> Service:
    """Load the base and its adapters, and return the service over them; its engine is not started.

    Args:
        settings: Settings of the base; the default model gives way to the base that the first adapter names.
        served: Models to begin with.
        keys: Keys of callers; None: none is needed.
        limits: Limits of the answers; None: the usual ones.
        engine: Further arguments of :class:`lorakeet.serve.engine.engine.Engine`.

    Raises:
        AdapterError: An adapter does not fit the base, or is refused.
        BaseModelError: See :func:`lorakeet.base.load.load_base`.
        ConfigError: Two adapters, or an adapter and the base, have one name.
    """
    adapters = served.adapters()
    task = None if served.task == "auto" else Task(served.task)
    for folder in list(adapters.values())[:1]:
        config = PeftConfig.from_pretrained(str(folder))
        settings = settings_of_base(settings, config, str(folder))
        task = task or adapter_task(str(folder), config)
    base_name = served.base_name or public_name(settings.model)
    if base_name in adapters:
        raise ConfigError(
            f"an adapter has the name of the base, {base_name!r}", "give the base another one with --name"
        )
    share_one_heap()
    library()  # compiled on first use, which may take longer than a caller waits
    opened = open_model(settings, task=task or Task())
    residents = Residents(opened, served.folder, allow_elsewhere=True)
    forward = partial(compiled_forward, agreement=agreement_of(opened.model.config, residents.placement.base))
    made = Engine(opened, residents, **{"make_forward": forward, **(engine or {})})
    for name, folder in adapters.items():
        _load(residents, name, folder)
    residents.allow_elsewhere = served.allow_hub
    return Service(made, opened, base_name, keys or Keys(), limits or Limits(), served.allow_hub)


def _load(residents: Residents, name: str, folder: Path) -> None:
    try:
        residents.load(name, folder)
    except AdapterError as error:
        raise AdapterError(f"{name!r} cannot be served: {error.message}", error.hint) from None


def public_name(model: str) -> str:
    """Return the name of a base for callers: a hub id as it is, and of a path its last part alone."""
    path = Path(model)
    is_path = path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2
    return path.name.removesuffix(".gguf") if is_path or model.endswith(".gguf") else model
