"""Follow one plain line of JSON Lines through ``lorakeet.data.prepare.prepare`` and list the files of ``data/`` it enters.

Run it with ``python scripts/follow_a_line.py``; ``--functions`` also lists the functions. It needs no model and no network.

Definitions, so that two versions of the package can be compared:

- An *entry* is the first call of a function or method in ``lorakeet/data`` that takes or returns the line: its text, in a
  string, a record, a row or a table. With ``--calls`` it is the first call of any function, also of those that only see
  settings or paths. Later calls of the same function do not count, nor do comprehensions, lambdas and module bodies.
- A *stay* is a maximal run of consecutive entries in one file.
- A *return* is a stay in a file that has had an earlier stay.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: The row that is followed: the plainest one that the program takes.
LINE = {"text": "Two things are infinite: the universe and human stupidity."}


@dataclass(frozen=True)
class Stay:
    """A maximal run of entries in one file."""

    file: str
    functions: tuple[str, ...]
    is_return: bool


@dataclass(frozen=True)
class Way:
    """The stays of one call, in order."""

    stays: tuple[Stay, ...]

    @property
    def files(self) -> int:
        """Number of different files."""
        return len({stay.file for stay in self.stays})

    @property
    def returns(self) -> int:
        """Number of stays in a file that had been left before."""
        return sum(stay.is_return for stay in self.stays)


def holds(value: Any, text: str, depth: int = 4) -> bool:
    """Whether ``text`` is in ``value``: a string, bytes, a container, a table with columns, or an object of ``lorakeet``."""
    if isinstance(value, str):
        return text in value
    if isinstance(value, bytes):
        return text.encode() in value
    if depth == 0 or value is None:
        return False
    if isinstance(value, dict):
        parts: Any = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    elif isinstance(getattr(value, "column_names", None), list):  # a Dataset or an Arrow table
        return bool({"text", "input_ids"} & set(value.column_names))
    elif type(value).__module__.startswith("lorakeet."):
        slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
        parts = (
            [*vars(value).values()] if hasattr(value, "__dict__") else [getattr(value, name, None) for name in slots]
        )
    else:
        return False
    return any(holds(part, text, depth - 1) for part in list(parts)[:50])


class Recorder:
    """Record the first entry of each function below ``folder``, while it is the profile function of the thread.

    Args:
        folder: Files that count.
        text: What an argument or a result must hold; None: every call counts.
    """

    def __init__(self, folder: Path, text: str | None = None) -> None:
        self._folder, self._text = f"{folder}{os.sep}", text
        self._seen: set[CodeType] = set()
        self.entries: list[tuple[str, str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Take one event of ``sys.setprofile``."""
        code = frame.f_code
        if event not in ("call", "return") or code in self._seen or not code.co_filename.startswith(self._folder):
            return
        if code.co_name.startswith("<") or not self._counts(frame, event, argument):
            return
        self._seen.add(code)
        self.entries.append((code.co_filename.removeprefix(self._folder), code.co_qualname))

    def _counts(self, frame: FrameType, event: str, argument: Any) -> bool:
        if self._text is None:
            return event == "call"
        if event == "return":
            return holds(argument, self._text)
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
        return any(holds(frame.f_locals.get(name), self._text) for name in names)


def stays(entries: list[tuple[str, str]]) -> Iterator[Stay]:
    """Yield the runs of entries in one file."""
    left: set[str] = set()
    for file, run in groupby(entries, key=lambda entry: entry[0]):
        yield Stay(file, tuple(function for _, function in run), file in left)
        left.add(file)


def follow(call: Callable[[], object], folder: Path, text: str | None = None) -> Way:
    """Return the way that ``call`` takes through the files below ``folder``; with ``text`` that of functions that hold it."""
    recorder = Recorder(folder, text)
    before = sys.getprofile()
    sys.setprofile(recorder)
    try:
        call()
    finally:
        sys.setprofile(before)
    return Way(tuple(stays(recorder.entries)))


def follow_a_line(*, calls: bool = False) -> Way:
    """Return the way of one row from a file to a sample; with ``calls`` that of all functions that are called for it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import lorakeet.data
    from helpers.bytewise import byte_tokenizer
    from lorakeet.config import DataSettings, TaskSettings
    from lorakeet.data.prepare import prepare

    tokenizer, before = byte_tokenizer(), os.environ.get("LORAKEET_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORAKEET_HOME"] = str(Path(folder) / "home")  # an empty cache: nothing is skipped
        path = Path(folder) / "line.jsonl"
        path.write_text(json.dumps(LINE) + "\n", encoding="utf-8")
        settings, task = DataSettings(path=str(path), eval_fraction=0.0), TaskSettings(type="CAUSAL_LM")
        try:
            folder_of_data = Path(str(lorakeet.data.__file__)).parent
            text = None if calls else LINE["text"][:20]
            return follow(lambda: prepare(settings, task, tokenizer, seed=0), folder_of_data, text)
        finally:
            os.environ.pop("LORAKEET_HOME")
            os.environ.update({} if before is None else {"LORAKEET_HOME": before})


def table(way: Way, *, functions: bool = False) -> str:
    """Return the stays as a table, and the figures below it."""
    lines = [f"{'stay':>4}  {'file':<32}  entries"]
    for number, stay in enumerate(way.stays, start=1):
        name = f"{stay.file} (return)" if stay.is_return else stay.file
        lines.append(f"{number:>4}  {name:<32}  {', '.join(stay.functions) if functions else len(stay.functions)}")
    return "\n".join([*lines, "", f"files {way.files}, stays {len(way.stays)}, returns {way.returns}"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="follow one line of JSON Lines through data preparation")
    parser.add_argument(
        "--functions", action="store_true", help="list the functions of each stay, not only their number"
    )
    parser.add_argument(
        "--calls", action="store_true", help="count every function that is called, with the line or not"
    )
    options = parser.parse_args()
    print(table(follow_a_line(calls=options.calls), functions=options.functions))


if __name__ == "__main__":
    main()
