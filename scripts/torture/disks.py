"""Disks that fail during a run: full, limited, read-only or gone, each before one operation on the run's files.

A session may go on, or end with an error that a user can act on. In neither case is anything half-written. When the disk is
usable again, the resumed run ends with the results of the run that nothing disturbed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.kernels.cpu.build import library
from torture.failing_disk import fill, limit_files, make_read_only, make_usable, small_disk
from torture.kills import SHOWN, leftovers
from torture.operations import at_each, count_into
from torture.sessions import Ended, fork
from torture.small_run import SmallRun, differences, results


@dataclass
class Trial:
    """A session whose disk failed, and the one that went on from it."""

    bits: int
    fault: str
    place: str
    operation: int
    code: int = 0
    said: str = ""
    faults: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Return the trial as JSON."""
        return asdict(self)


#: Beginnings of the differences that do not count after a fault: files, and the lines of a log that was removed.
LOST = ("files: ", "metrics.jsonl: ", "summary.json: ", "adapter/lorakeet.json: ")
#: Places of a run's files: its own folder, the cache, and the system's folder for temporary files.
PLACES = ("run", "cache", "temporary")


class Disks:
    """Runs of one kind on disks that fail.

    Args:
        run: The command.
        folder: Folder of the logs and of the mounted disk.
        chance: Source of the moments.
        expected: Results of the run that nothing disturbs.
    """

    def __init__(self, run: SmallRun, folder: Path, chance: random.Random, expected: dict[str, Any]) -> None:
        self.run, self.chance, self.expected = run, chance, expected
        self.folder, self.log = folder, folder / "session.log"
        self.sound, self.disk = folder / "sound", folder / "disk"
        self.operations: dict[str, int] = {}

    def places(self, on_disk: str) -> dict[str, Path]:
        """Return the folder of each place; one is on the disk that fails."""
        return {name: (self.disk if name == on_disk else self.sound) / name for name in PLACES}

    def session(self, places: dict[str, Path], before: Callable[[], None] | None = None) -> Ended:
        """Run or resume the command with these places, and with ``before`` called at its start."""

        def enter() -> None:
            os.environ["LORAKEET_HOME"] = str(places["cache"])
            tempfile.tempdir = os.environ["TMPDIR"] = str(places["temporary"])
            if self.disk in places["cache"].parents:
                library.cache_clear()
            if before is not None:
                before()

        places["temporary"].mkdir(parents=True, exist_ok=True)
        return fork(self.run.words(places["run"], "--resume"), self.log, enter).wait()

    def count(self, place: str) -> int:
        """Return the number of operations in a place of a run whose disks are sound."""
        if place not in self.operations:
            with small_disk(self.disk), self._fresh():
                places, counter = self.places(place), self.folder / "operations"
                counter.write_text("0")
                ended = self.session(places, at_each(places[place], count_into(counter)))
                found = differences(self.expected, results(places["run"]))
                if ended.code or found:
                    raise RuntimeError(f"a run on a sound disk ended with code {ended.code}: {ended.said} {found}")
                self.operations[place] = int(counter.read_text())
        return self.operations[place]

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        shutil.rmtree(self.sound, ignore_errors=True)
        yield

    def trial(self, fault: str | None = None, place: str | None = None, operation: int | None = None) -> Trial:
        """Let the disk of one place fail at one operation, make it usable again, and resume."""
        fault = fault or self.chance.choice(list(FAULTS))
        place = place or self.chance.choices(PLACES, (6, 2, 1))[0]
        operation = operation or self.chance.randint(1, max(self.count(place), 1))
        trial = Trial(self.run.bits, fault, place, operation)
        with small_disk(self.disk), self._fresh():
            places = self.places(place)
            act = FAULTS[fault](self.disk, places[place])
            ended = self.session(places, at_each(places[place], lambda count: act(count - operation)))
            trial.code, trial.said = ended.code, _last_words(ended)
            self._judge(trial, ended, places["run"])
            make_usable(self.disk)
            if ended.code and not trial.faults:
                self._judge_resumed(trial, self.session(places), places["run"])
        return trial

    def _judge(self, trial: Trial, ended: Ended, out: Path) -> None:
        """Note the faults of the session whose disk failed."""
        if ended.crashed or ended.code not in (0, 2):
            trial.faults.append(f"code {ended.code}: {ended.said[-SHOWN:]}")
        elif ended.code == 0:
            lost = LOST if trial.fault == "folder removed" else LOST[:1]  # checkpoints may be missing
            found = differences(self.expected, results(out))
            trial.faults += [text for text in found if not text.startswith(lost)]
        elif out.exists() and trial.fault != "read-only" and (left := leftovers(out)):
            trial.faults.append(f"half-written files stay: {left}")

    def _judge_resumed(self, trial: Trial, ended: Ended, out: Path) -> None:
        """Note the faults of the session that went on with a usable disk."""
        if ended.crashed or ended.code not in (0, 2):
            trial.faults.append(f"resumed, code {ended.code}: {ended.said[-SHOWN:]}")
        elif ended.code == 2 and trial.fault != "folder removed":
            trial.faults.append(f"cannot be resumed: {_last_words(ended)}")
        elif ended.code == 0:
            trial.faults += differences(self.expected, results(out))


def _last_words(ended: Ended) -> str:
    """Return the error of a session, or its warnings."""
    lines = ended.said.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return " ".join(errors or [line for line in lines if re.match("warning: .*(write|disk|space|room)", line)])


def _fill(disk: Path, place: Path) -> Callable[[int], None]:
    return lambda late: fill(disk) if late == 0 else None


def _fill_for_a_while(disk: Path, place: Path) -> Callable[[int], None]:
    return lambda late: fill(disk) if late == 0 else make_usable(disk) if late == WHILE else None


def _limit(disk: Path, place: Path) -> Callable[[int], None]:
    return lambda late: limit_files() if late == 0 else None


def _read_only(disk: Path, place: Path) -> Callable[[int], None]:
    return lambda late: make_read_only(disk) if late == 0 else None


def _gone(disk: Path, place: Path) -> Callable[[int], None]:
    return lambda late: shutil.rmtree(place, ignore_errors=True) if late == 0 else None


def _checkpoints_gone(disk: Path, place: Path) -> Callable[[int], None]:
    return lambda late: shutil.rmtree(place / "checkpoints", ignore_errors=True) if late == 0 else None


#: Operations for which a disk stays full that is full for a while.
WHILE = 100
#: Fault -> function that returns the act of each operation, by its distance from the chosen one.
FAULTS: dict[str, Callable[[Path, Path], Callable[[int], None]]] = {
    "full": _fill,
    "full for a while": _fill_for_a_while,
    "limit of a file's size": _limit,
    "read-only": _read_only,
    "folder removed": _gone,
    "checkpoints removed": _checkpoints_gone,
}
