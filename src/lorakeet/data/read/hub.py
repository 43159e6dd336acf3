"""Data sets of the hub, through ``datasets``, which caches them below :func:`lorakeet.files.cache_home`."""

from __future__ import annotations

from pathlib import Path

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from lorakeet.data.read.locate import near
from lorakeet.errors import DataError
from lorakeet.files import cache_home


def hub_table(name: str, subset: str | None, split: str) -> datasets.Dataset:
    """Load a split of the hub data set ``name``, mapped from disk.

    Raises:
        DataError: there is none, it cannot be read, or the split is empty.
    """
    home = cache_home() / "datasets"
    _ask_hub(name, home)
    try:
        rows = datasets.load_dataset(name, subset, split=split, cache_dir=str(home))
    except Exception as error:  # whatever the network, the hub or the files of a stranger may raise
        raise DataError(
            f"cannot read {name!r} from the hub: {_first_line(error)}", "check its files, data.subset and data.split"
        ) from error
    if not len(rows):
        raise DataError(f"split {split!r} of {name!r} is empty", "choose another data.split")
    return rows


def _ask_hub(name: str, home: Path) -> None:
    """Check that the hub has ``name`` or a copy is cached: without, ``datasets`` would try for half a minute.

    Raises:
        DataError: the hub lacks ``name`` or cannot be reached, and no copy is cached.
    """
    owner, _, short = name.partition("/")
    if list(home.glob(f"{owner}___{datasets.naming.camelcase_to_snakecase(short)}/*")):
        return
    try:
        HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        hint = near(Path(name)) or "check the name, and `hf auth login` if it is private"
        raise DataError(f"no file or folder {name!r} here, and no such data set on the hub", hint) from error
    except Exception as error:  # each release of the client has its own names for a broken network
        reason = f"the hub cannot be asked: {_first_line(error)}"
        hint = (
            near(Path(name))
            or f"connect once, or `hf download --repo-type dataset {name}` elsewhere and give its folder"
        )
        raise DataError(f"no file or folder {name!r} here, and {reason}", hint) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
