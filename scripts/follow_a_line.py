"""Follow one plain line of JSON Lines through ``lorakeet.data.prepare.prepare`` and list the files of ``data/`` it enters.

Run it with ``python scripts/follow_a_line.py``; ``--functions`` also lists the functions. It needs no model and no network.

Definitions, so that two versions of the package can be compared:

- An *entry* is the first call of a function or method in ``lorakeet/data``. Later calls of the same function do not count,
  nor do comprehensions, lambdas and module bodies.
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


class Recorder:
    """Record the first call of each function below ``folder``, while it is the profile function of the thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder}{os.sep}"
        self._seen: set[CodeType] = set()
        self.entries: list[tuple[str, str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Take one event of ``sys.setprofile``."""
        code = frame.f_code
        if event != "call" or code in self._seen or not code.co_filename.startswith(self._folder):
            return
        self._seen.add(code)
        if not code.co_name.startswith("<"):
            self.entries.append((code.co_filename.removeprefix(self._folder), code.co_qualname))


def stays(entries: list[tuple[str, str]]) -> Iterator[Stay]:
    """Yield the runs of entries in one file."""
    left: set[str] = set()
    for file, run in groupby(entries, key=lambda entry: entry[0]):
        yield Stay(file, tuple(function for _, function in run), file in left)
        left.add(file)


def follow(call: Callable[[], object], folder: Path) -> Way:
    """Return the way that ``call`` takes through the files below ``folder``."""
    recorder = Recorder(folder)
    before = sys.getprofile()
    sys.setprofile(recorder)
    try:
        call()
    finally:
        sys.setprofile(before)
    return Way(tuple(stays(recorder.entries)))


def follow_a_line() -> Way:
    """Return the way of one row from a file to a sample."""
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
            return follow(lambda: prepare(settings, task, tokenizer, seed=0), Path(str(lorakeet.data.__file__)).parent)
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
    print(table(follow_a_line(), functions=parser.parse_args().functions))


if __name__ == "__main__":
    main()
