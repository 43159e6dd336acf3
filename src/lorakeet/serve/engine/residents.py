"""Adapters that are served: names over one folder, and the version of each that answers now.

A load reads and checks the files in the caller's thread, and changes the model between two steps of the engine. Each load is
a version of its own in the model: requests under way keep theirs, and it leaves the model with the last of them.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.load import Base
from lorakeet.errors import AdapterError, UnknownAdapter, did_you_mean
from lorakeet.loaded_model import LoadedModel
from lorakeet.lora.lifecycle.adapter_files import CONFIG_NAME, adapter_folder
from lorakeet.lora.lifecycle.adapter_names import check_adapter_name
from lorakeet.lora.lifecycle.adoption import adopt
from lorakeet.lora.target_parameters import LoraParameter
from lorakeet.security.paths import is_dir, is_file, is_plain_name, outside
from lorakeet.serve.cache.prefix_cache import prefix_root
from lorakeet.serve.engine.adapter_files import read_adapter
from lorakeet.serve.engine.placement import Placement, Prepared
from lorakeet.tasks.task import Task
from lorakeet.tasks.taught import Taught


@dataclass(eq=False)
class Resident:
    """Version of a served adapter, in the model.

    Attributes:
        name: Its public name.
        version: Number of the load, from 1; a replaced adapter has a later one.
        slot: Its name in the model, unique to this version.
        digest: Hash of its files.
        scale: Factor of its update.
        mixes: Whether rows with it can run in one batch with rows of other adapters.
        source: Folder or hub id that it was loaded from.
        rank: Its largest rank.
        bytes: Bytes of its tensors.
        taught: Settings that it was taught with.
        users: Requests under way that it answers.
        retired: Whether it has been replaced or unloaded; it leaves the model with its last request.
    """

    name: str
    version: int
    slot: str
    digest: str
    scale: float = 1.0
    mixes: bool = True
    source: str = ""
    rank: int = 0
    bytes: int = 0
    taught: Taught = field(default_factory=Taught, repr=False)
    users: int = field(default=0, repr=False)
    retired: bool = False


class Residents:
    """The served adapters of one base, by name.

    Attributes:
        folder: Folder with a folder for each adapter that may be loaded by its name; None: there is none.
        allow_elsewhere: Whether a load may name another folder or a hub id. Only the owner of the server says so.
        between_steps: Function that runs another one while no step runs; the engine's.
        get_ready: Function that makes ready what steps need of a new version, before it answers; the engine's.
    """

    def __init__(
        self, opened: LoadedModel | Base, folder: str | Path | None = None, *, allow_elsewhere: bool = False
    ) -> None:
        """Begin without adapters.

        Args:
            opened: The base, opened without adapters.
            folder: See the attribute.
            allow_elsewhere: See the attribute.
        """
        self.model: Any = adopt(opened.model, PeftModel)
        self.task = Task() if isinstance(opened, Base) else opened.task
        self.folder = None if folder is None else Path(folder)
        self.allow_elsewhere = allow_elsewhere
        self.between_steps: Callable[[Callable[[], Any]], Any] = lambda task: task()
        self.get_ready: Callable[[Resident], None] = lambda resident: None
        self.placement = Placement(self.model)
        self._base = hashlib.sha256(json.dumps(self.placement.base, sort_keys=True).encode()).hexdigest()
        self._served: dict[str, Resident] = {}
        self._versions: builtins.list[Resident] = []  # all that are in the model
        self._loads = 0
        self._lock = threading.Lock()  # of the table and the counts
        self._loading = threading.Lock()  # one load at a time

    # -- look -------------------------------------------------------------------------------------------------------

    def list(self) -> builtins.list[Resident]:
        """Return the versions that answer now, by name."""
        with self._lock:
            return [self._served[name] for name in sorted(self._served)]

    def version(self, name: str) -> int:
        """Return the version that answers now.

        Raises:
            UnknownAdapter: The adapter is not served.
        """
        with self._lock:
            return self._known(name).version

    def found(self) -> builtins.list[str]:
        """Return the names in the folder that look like adapters, served or not."""
        if self.folder is None or not is_dir(self.folder):
            return []
        names = sorted(path.name for path in self.folder.iterdir() if is_dir(path))
        return [name for name in names if is_file(adapter_folder(self.folder / name) / CONFIG_NAME)]

    def acquire(self, name: str) -> Resident:
        """Return the version that answers now, for one more request.

        Raises:
            UnknownAdapter: The adapter is not served.
        """
        with self._lock:
            resident = self._known(name)
            resident.users += 1
            return resident

    def release(self, resident: Resident) -> None:
        """Note that a request of a version has ended."""
        with self._lock:
            resident.users -= 1
            unused = resident.retired and resident.users == 0
        if unused:
            self.between_steps(self._tidy)

    def root(self, resident: Resident | None) -> bytes:
        """Return the hash that keys of the prefix cache begin with."""
        if resident is None:
            return prefix_root(self._base, "", 1.0)
        return prefix_root(self._base, resident.digest, resident.scale)

    def _known(self, name: str) -> Resident:
        if name not in self._served:
            raise UnknownAdapter(
                f"no adapter {name!r} is served, there is {', '.join(self._served) or 'none'}",
                did_you_mean(name, self._served),
            )
        return self._served[name]

    # -- load and unload --------------------------------------------------------------------------------------------

    def load(self, name: str, source: str | Path | None = None, *, scale: float = 1.0) -> Resident:
        """Serve an adapter under a name, in place of the version that has it.

        Args:
            name: Its public name.
            source: Name of a folder in :attr:`folder`, None: the same name; or elsewhere, a path or a hub id.
            scale: Factor of its update.

        Returns:
            The new version.

        Raises:
            AdapterError: The name is no plain name, or there is no such adapter. It does not fit the base, was trained on
                another one or not at all, has NaN, or would change the base. The model is as before then.
        """
        check_public_name(name)
        files = read_adapter(self._source(name, source), self.task)
        try:
            with self._loading:
                slot = f"served{self._loads + 1}"
                prepared = self.placement.prepare(slot, files, scale)
                resident = self.between_steps(lambda: self._put(name, slot, prepared, scale))
                self._get_ready(resident)
                self._serve(resident)
        finally:
            self.between_steps(self._tidy)
        return resident

    def _get_ready(self, resident: Resident) -> None:
        """Let the engine's forward pass make ready what it needs of a version; in the caller's thread."""
        try:
            self.get_ready(resident)
        except BaseException:
            resident.retired = True
            raise

    def _serve(self, resident: Resident) -> None:
        """Let a version answer under its name from now on."""
        with self._lock:
            if (before := self._served.get(resident.name)) is not None:
                before.retired = True
            self._served[resident.name] = resident

    def unload(self, name: str) -> None:
        """Serve an adapter no longer; requests under way are answered.

        Raises:
            UnknownAdapter: The adapter is not served.
        """
        with self._lock:
            self._known(name).retired = True
            del self._served[name]
        self.between_steps(self._tidy)

    def _tidy(self) -> None:
        """Take retired versions without requests out of the model; in the engine's thread.

        While a load reads the model it is left as it is; the next load, or the end of a request, does it then.
        """
        if not self._loading.acquire(blocking=False):
            return
        try:
            with self._lock:
                unused = [one for one in self._versions if one.retired and not one.users]
                self._versions = [one for one in self._versions if one not in unused]
            for resident in unused:
                self.placement.remove(resident.slot)
        finally:
            self._loading.release()

    def _source(self, name: str, source: str | Path | None) -> str:
        """Return the folder or hub id to load from.

        Raises:
            AdapterError: It is not in the folder of adapters, and the owner has not allowed other places.
        """
        folder = name if source is None else str(source)
        if not is_plain_name(folder):
            if self.allow_elsewhere:
                return folder
            raise AdapterError(
                "an adapter from another place is not loaded here, expected a name in the folder of adapters",
                "put it into the folder; or let the server load from elsewhere, if you own it",
            )
        if self.folder is None:
            raise AdapterError(f"there is no folder of adapters to load {name!r} from", "start the server with one")
        if outside(self.folder, folder) or not is_dir(self.folder / folder):
            raise AdapterError(
                f"no adapter {folder!r} in the folder of adapters, it has {', '.join(self.found()) or 'none'}",
                did_you_mean(folder, self.found()),
            )
        return str(self.folder / folder)

    def _put(self, name: str, slot: str, prepared: Prepared, scale: float) -> Resident:
        """Put a version on the model, all or nothing; in the engine's thread.

        Args:
            name: Its public name.
            slot: Its name in the model.
            prepared: The adapter.
            scale: Factor of its update.
        """
        self._loads += 1
        self.placement.put(slot, prepared)
        layers = [layer for layer in self.model.lora_layers() if slot in layer.r]
        for layer in layers:
            layer.set_scale(slot, scale)
        files = prepared.files
        resident = Resident(
            name,
            self._loads,
            slot,
            files.digest,
            scale,
            mixes=not any(isinstance(layer, LoraParameter) for layer in layers),
            source=files.source,
            rank=max((layer.r[slot] for layer in layers), default=0),
            bytes=sum(tensor.nbytes for tensor in files.tensors.values()),
            taught=Taught.from_notes(files.notes),
        )
        with self._lock:
            self._versions.append(resident)
        return resident


def check_public_name(name: object) -> None:
    """Refuse a name that is a path, a hub id, or of characters that an address or a log line cannot hold.

    Raises:
        AdapterError: It is one.
    """
    if not is_plain_name(name):
        raise AdapterError(
            f"an adapter cannot be served as {name!r}: it is no plain name", "use letters, digits, '-' and '_'"
        )
    check_adapter_name(name)
