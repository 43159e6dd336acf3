"""Adapters that are served: names over one folder, and the version of each that answers now.

A load reads and checks the files in the caller's thread, and changes the model between two steps of the engine. Each load is
a version of its own in the model: requests under way keep theirs, and it leaves the model with the last of them.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.load import Base
from lorakeet.errors import AdapterError, UnknownAdapter, did_you_mean
from lorakeet.kernels.decoder_step import Update
from lorakeet.loaded_model import LoadedModel
from lorakeet.lora.lifecycle.adapter_files import CONFIG_NAME, adapter_folder
from lorakeet.lora.lifecycle.adapter_names import check_adapter_name
from lorakeet.lora.lifecycle.adoption import adopt
from lorakeet.lora.target_parameters import LoraParameter
from lorakeet.runs.process_memory import return_free_memory
from lorakeet.security.paths import is_dir, is_file, is_plain_name, outside
from lorakeet.serve.cache.prefix_cache import prefix_root
from lorakeet.serve.engine.adapter_files import read_adapter
from lorakeet.serve.engine.placement import Placement, Prepared
from lorakeet.tasks.task import Task
from lorakeet.tasks.taught import Taught

#: Function that returns the update of a linear layer by its name; None for one that compiled loops cannot compute.
MakeUpdate = Callable[[str], Update | None]


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
        copy: The copy by which the forward pass computes its rows; None: the model has it.
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
    copy: Any = field(default=None, repr=False)


class Residents:
    """The served adapters of one base, by name.

    Attributes:
        folder: Folder with a folder for each adapter that may be loaded by its name; None: there is none.
        allow_elsewhere: Whether a load may name another folder or a hub id. Only the owner of the server says so.
        between_steps: Function that runs another one while no step runs; the engine's.
        own_copy: Function of linear layers, and of one that returns the update of each, which makes the forward pass's own
            copy of an adapter; None: it has none, and computes the adapter in the model. The engine's.
        get_ready: Function that makes ready what steps need of a new version in the model; the engine's.
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
        self.own_copy: Callable[[Sequence[str], MakeUpdate], Any] = lambda layers, update: None
        self.get_ready: Callable[[Resident], None] = lambda resident: None
        self.placement = Placement(self.model)
        self._base = hashlib.sha256(json.dumps(self.placement.base, sort_keys=True).encode()).hexdigest()
        self._served: dict[str, Resident] = {}
        self._held: builtins.list[Resident] = []  # versions whose weights are in memory
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
            self._tidy()

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
                prepared = self.placement.prepare(f"served{self._loads + 1}", files, scale)
                resident = self._add(name, prepared)
                self._serve(resident)
        finally:
            self._tidy()
        return resident

    def _add(self, name: str, prepared: Prepared) -> Resident:
        """Return a further version that answers no request yet: a copy of the forward pass, or else in the model."""
        copy = None
        if prepared.layers is not None:
            copy = self.own_copy(prepared.layers, lambda layer: self.placement.update(prepared, layer))
        if copy is not None:
            return self._hold(self._made(name, prepared, copy=copy))
        parts = self.placement.parts(prepared)
        resident: Resident = self.between_steps(lambda: self._put(name, prepared, parts))
        self._get_ready(resident)
        return resident

    def _hold(self, resident: Resident) -> Resident:
        """Note that the weights of a version are in memory, and return it."""
        with self._lock:
            self._held.append(resident)
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
        self._tidy()

    def _tidy(self) -> None:
        """Drop retired versions without requests, in the model or beside it, and return their memory to the system.

        While a load reads the model it is left as it is; the next load, or the end of a request, does it then.
        """
        if not self._loading.acquire(blocking=False):
            return
        try:
            with self._lock:
                unused = [one for one in self._held if one.retired and not one.users]
                self._held = [one for one in self._held if one not in unused]
            if slots := [one.slot for one in unused if one.copy is None]:
                self.between_steps(lambda: self.placement.remove(slots))
            for one in unused:
                one.copy = None
            if unused:
                return_free_memory()
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

    def _put(self, name: str, prepared: Prepared, parts: Any) -> Resident:
        """Put a version on the model, all or nothing; in the engine's thread."""
        self.placement.put(prepared, parts)
        layers = [layer for layer in self.model.lora_layers() if prepared.slot in layer.r]
        mixes = not any(isinstance(layer, LoraParameter) for layer in layers)
        rank = max((layer.r[prepared.slot] for layer in layers), default=0)
        return self._hold(self._made(name, prepared, mixes=mixes, rank=rank))

    def _made(self, name: str, prepared: Prepared, **more: Any) -> Resident:
        """Return a further version.

        Args:
            name: Its public name.
            prepared: The adapter.
            **more: Further attributes.
        """
        self._loads += 1
        files = prepared.files
        return Resident(
            name,
            self._loads,
            prepared.slot,
            files.digest,
            prepared.scale,
            source=files.source,
            bytes=sum(tensor.nbytes for tensor in files.tensors.values()),
            taught=Taught.from_notes(files.notes),
            **{"rank": max((one.r for one in (prepared.targets or {}).values()), default=0), **more},
        )


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
