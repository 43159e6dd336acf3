"""Files of an adapter: in a folder, in the folder of its run, or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakeet.errors import AdapterError, LorakeetError
from lorakeet.files import hub_file
from lorakeet.security.paths import exists, file_problem, is_dir, is_file

CONFIG_NAME = "adapter_config.json"

#: Arguments of a download from the hub, by huggingface_hub's names.
DOWNLOAD_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
#: Arguments of :func:`find_adapter_file` that say where to look.
FILE_ARGUMENTS = ("revision", "subfolder", *DOWNLOAD_ARGUMENTS)


def adapter_folder(name: str | Path) -> Path:
    """Return the folder of an adapter: the one named, or its folder ``adapter`` if it is that of a run."""
    folder = Path(name)
    inner = folder / "adapter"
    return inner if is_file(inner / CONFIG_NAME) and not exists(folder / CONFIG_NAME) else folder


def find_adapter_file(
    name: str | Path, filename: str, *, revision: str | None = None, subfolder: str | None = None, **download: Any
) -> Path | None:
    """Find a file of an adapter, downloading it if need be.

    Args:
        name: Folder or hub id of the adapter, or the folder of its run.
        filename: Name of the file.
        revision: Revision of the hub repository.
        subfolder: Folder in the repository or folder.
        download: Arguments of the download: ``token``, ``cache_dir``, ``local_files_only``, ``force_download``, ``proxies``.

    Returns:
        The path; None if the adapter has no such file.

    Raises:
        AdapterError: there is no such folder and the hub has no such adapter, or cannot be reached. Or the file is a link
            that leads out of the folder, or no regular file.
    """
    inner = f"{subfolder}/{filename}" if subfolder else filename
    folder = adapter_folder(name)
    if is_dir(folder):
        if problem := file_problem(folder, inner):
            raise AdapterError(f"{folder} is refused: {problem}", "copy the file itself into the folder")
        return folder / inner if is_file(folder / inner) else None
    text = str(name)
    if exists(folder) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        found = "is a file" if exists(folder) else "does not exist"
        raise AdapterError(
            f"adapter {text!r} {found}, expected a folder with {CONFIG_NAME} or a hub id like user/name",
            "give the folder `adapter` of a run, or user/name",
        )
    try:
        return hub_file(text, inner, revision=revision, **download)
    except LorakeetError as error:
        raise AdapterError(f"adapter {text!r} is not a folder here; {error.message}", error.hint) from error
