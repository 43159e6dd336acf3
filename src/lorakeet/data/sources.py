"""From a name to rows: find the data, read it, choose the column that holds the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from lorakeet.config import DataSettings
from lorakeet.data.find import data_files, locate, near
from lorakeet.data.formats import Table, read_table, some
from lorakeet.errors import DataError, did_you_mean
from lorakeet.files import cache_home

#: Names by which a column of text is known, without regard to case; the first wins, two of the others are ambiguous.
TEXT_NAMES = ("text", "quote", "quotation", "content", "sentence", "document", "body", "passage", "story")


def read_rows(settings: DataSettings) -> datasets.Dataset:
    """The rows of ``settings.path``: a column ``text`` (string or null) and, where the source has one, ``author``.

    Files are read into memory. The files of a folder follow each other by name. ``info.description`` says what was
    read.

    Raises:
        DataError: there is no such data, it is empty or broken (with file and line), or no column of text can be
            found in it.
    """
    path = locate(settings.path)
    if path is None:
        tables = [_hub(settings)]
    else:
        files = data_files(path, settings.split) if path.is_dir() else [path]
        tables = [read_table(file, settings.format, settings.split) for file in files]
    names = [choose_column(table, settings.text_column) for table in tables]
    texts = [text for table, name in zip(tables, names, strict=True) for text in _texts(table, name)]
    columns = {"text": texts[: settings.limit]}
    if any(_has_author(table) for table in tables):
        authors = [author for table in tables for author in _authors(table)]
        columns["author"] = authors[: settings.limit]
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    info = datasets.DatasetInfo(description=_describe(settings, tables, names), features=features)
    return datasets.Dataset.from_dict(columns, info=info, features=features)


def choose_column(table: Table, wanted: str | None = None) -> str:
    """The column that holds the text: the one named, one of :data:`TEXT_NAMES`, or the only one of strings.

    Raises:
        DataError: there is no such column, none of strings, or more than one that may be meant.
    """
    columns = ", ".join(f"{name!r} ({kind})" for name, kind in table.types.items())
    if wanted is not None:
        if wanted not in table.types:
            raise DataError(
                f"{table.source} has no column {wanted!r}; it has {columns}", did_you_mean(wanted, table.types)
            )
        return wanted
    likely = [name for name, kind in table.types.items() if "str" in kind.split(" or ")]
    known = [name for name in likely if name.lower() in TEXT_NAMES]
    plain = [name for name in known if name.lower() == TEXT_NAMES[0]]
    for choice in (plain, known, likely):
        if len(choice) == 1:
            return choice[0]
        if choice:
            raise DataError(
                f"{table.source} has more than one column of text: {', '.join(map(repr, choice))}",
                f"name the one to learn: --text-column {choice[0]}",
            )
    raise DataError(f"{table.source} has no column of text; it has {columns}", "a text is a string in one column")


def _texts(table: Table, name: str) -> Sequence[str | None]:
    """The values of the text column, each checked to be a whole string or null."""
    values = table.values(name)
    faults = []
    for place, value in zip(table.places, values, strict=True):
        if fault := _fault(value):
            faults.append(f"{table.unit} {place} holds {fault}")
    if faults:
        raise DataError(f"{table.source}, column {name!r}: {some(faults)}; expected a string")
    return values


def _fault(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return type(value).__name__
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        return f"half a character, \\u{ord(value[error.start]):04x}"
    return None


def _has_author(table: Table) -> bool:
    return table.types.get("author") == "str"


def _authors(table: Table) -> Sequence[str | None]:
    return table.values("author") if _has_author(table) else [None] * len(table.places)


def _describe(settings: DataSettings, tables: Sequence[Table], names: Sequence[str]) -> str:
    formats = " and ".join(sorted({table.format for table in tables}))
    files = f"{len(tables)} files, {formats}" if len(tables) > 1 else formats
    columns = ", ".join(dict.fromkeys(map(repr, names)))
    return f"{settings.path} ({files}), text in column {columns}"


def _hub(settings: DataSettings) -> Table:
    """A split of a hub data set, through ``datasets``, which caches it below :func:`lorakeet.files.cache_home`."""
    name, home = str(settings.path), cache_home() / "datasets"
    _ask_hub(name, home)
    try:
        rows = datasets.load_dataset(name, settings.subset, split=settings.split, cache_dir=str(home))
    except Exception as error:  # whatever the network, the hub or the files of a stranger may raise
        raise DataError(f"cannot read {name!r} from the hub: {_first_line(error)}") from error
    if not len(rows):
        raise DataError(f"split {settings.split!r} of {name!r} is empty")
    types = {column: _type_name(feature) for column, feature in rows.features.items()}
    return Table(repr(name), "hub", types, lambda column: rows[column][:], range(1, len(rows) + 1), "row")


def _ask_hub(name: str, home: Path) -> None:
    """Fail at once where the hub lacks ``name`` or cannot be reached: ``datasets`` would try for half a minute.

    Raises:
        DataError: so it is, and no copy of ``name`` is cached.
    """
    owner, _, short = name.partition("/")
    if list(home.glob(f"{owner}___{camelcase_to_snakecase(short)}/*")):
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


def _type_name(feature: Any) -> str:
    name = str(getattr(feature, "dtype", None) or type(feature).__name__)
    return "str" if name in ("string", "large_string") else name
