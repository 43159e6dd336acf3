"""Kills of a run by SIGKILL, each at a moment that a seed decides, and the comparison with the undisturbed run.

There are three kinds of moments: seconds after the start, part of a second after a save has begun, and the n-th operation on
a file of the run's folder. Some sessions are forks of this process, and some are started as a shell starts them.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torture.operations import at_each, at_number, count_into, kill
from torture.sessions import Ended, Session, fork, start
from torture.small_run import SmallRun, differences, results

#: Kinds of moments, and how often each is drawn.
KINDS = {"clock": 2, "save": 4, "file operation": 4}
#: Seconds after the begin of a save in which it is killed; a save of the small run takes about as long.
SAVE_SECONDS = 0.08
#: Greatest number of kills of one run.
KILLS_OF_A_RUN = 3
#: Share of the sessions that are started as a shell starts them, which takes seconds longer.
STARTED = 0.1
#: Ways to go on with a run: to ask for it, or simply the same command again.
AGAIN = ((), ("--resume",))
#: Last characters of a session's output that a fault shows.
SHOWN = 2000


@dataclass(frozen=True)
class Length:
    """Length of the undisturbed run: its seconds, saves and file operations."""

    seconds: float
    saves: int
    operations: int


@dataclass(frozen=True)
class Moment:
    """A moment to kill a session at: seconds, a save and seconds of it, or a file operation."""

    kind: str
    number: int = 0
    seconds: float = 0.0

    @classmethod
    def draw(cls, chance: random.Random, length: Length) -> Moment:
        """Draw a moment of a run of this length."""
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "clock":
            return cls(kind, seconds=chance.uniform(0, length.seconds))
        if kind == "save":
            return cls(kind, chance.randint(1, length.saves), chance.uniform(0, SAVE_SECONDS))
        return cls(kind, chance.randint(1, length.operations))


@dataclass
class Trial:
    """A run that was killed and resumed until it ended."""

    bits: int
    kills: list[Moment] = field(default_factory=list)
    in_a_save: int = 0
    sessions: int = 0
    faults: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Return the trial as JSON."""
        return asdict(self)


def leftovers(out: Path) -> list[str]:
    """Return the temporary files and folders of writes that were not finished."""
    return sorted(
        str(path.relative_to(out)) for path in out.rglob(".*") if path.suffix == ".tmp" or "rehears" in path.name
    )


class SaveWatch:
    """Watch over the folder of a run: the saves that have begun, each a new temporary file or folder.

    Args:
        out: Folder of the run.
        moment: Save to wait for, and seconds of it; None only counts.
    """

    def __init__(self, out: Path, moment: Moment | None = None) -> None:
        self.places, self.moment = (out, out / "checkpoints"), moment
        self.seen: set[str] = set()
        self._began: float | None = None

    def __call__(self, seconds: float) -> bool:
        """Whether the moment has come, ``seconds`` after the start of the session."""
        for place in self.places:
            self.seen.update(path.name for path in place.glob(".*.tmp"))
        if self.moment is None or len(self.seen) < self.moment.number:
            return False
        self._began = seconds if self._began is None else self._began
        return seconds - self._began >= self.moment.seconds


@dataclass
class Killer:
    """Runs of one kind that are killed and resumed.

    Attributes:
        run: The command.
        folder: Folder for the runs and their logs.
        chance: Source of the moments.
        expected: Results of the undisturbed run.
        length: Its length.
    """

    run: SmallRun
    folder: Path
    chance: random.Random
    expected: dict[str, Any] = field(init=False)
    length: Length = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.out, self.log = self.folder / "run", self.folder / "session.log"

    def measure(self) -> None:
        """Run without a kill, and keep its results and its length."""
        shutil.rmtree(self.out, ignore_errors=True)
        counter, saves = self.folder / "operations", SaveWatch(self.out)
        ended = fork(self.run.words(self.out), self.log, at_each(self.out, count_into(counter))).wait(saves)
        self.expected = self._results(ended)
        self.length = Length(ended.seconds, len(saves.seen), int(counter.read_text()))

    def measure_started(self) -> None:
        """Run without a kill as a shell starts it, and compare: the forks must not differ from it.

        Raises:
            RuntimeError: They differ.
        """
        shutil.rmtree(self.out)
        again = self._results(start(self.run.words(self.out), self.log).wait())
        if found := differences(self.expected, again):
            raise RuntimeError(f"two runs without a kill differ: {found}")

    def _results(self, ended: Ended) -> dict[str, Any]:
        if ended.code:
            raise RuntimeError(f"a run without a kill ended with code {ended.code}: {ended.said}")
        return results(self.out)

    def trial(self, moments: list[Moment] | None = None) -> Trial:
        """Run with kills at random moments, or at those given, resume it until it ends, and compare the results."""
        while True:
            trial = Trial(self.run.bits)
            shutil.rmtree(self.out, ignore_errors=True)
            kills = self.chance.randint(1, KILLS_OF_A_RUN)
            left = [Moment.draw(self.chance, self.length) for _ in range(kills)] if moments is None else list(moments)
            while (ended := self._session(left.pop(0) if left else None, trial)).killed:
                pass
            if trial.kills or moments is not None:  # else the run was faster than its moment
                break
        if ended.crashed or not (self.out / "summary.json").exists():
            trial.faults.append(f"code {ended.code}: {ended.said[-SHOWN:]}")
        else:
            trial.faults += differences(self.expected, results(self.out))
        return trial

    def _session(self, moment: Moment | None, trial: Trial) -> Ended:
        """Begin the run or go on with it, kill it at ``moment``, and note what became of it."""
        kind = None if moment is None else moment.kind
        session = self._begin(None if moment is None or kind != "file operation" else moment.number)
        if kind == "clock":
            ended = session.wait(lambda seconds: seconds >= moment.seconds)
        else:
            ended = session.wait(SaveWatch(self.out, moment) if kind == "save" else None)
        trial.sessions += 1
        if ended.killed and moment is not None:
            trial.kills.append(moment)
            trial.in_a_save += bool(leftovers(self.out))
        return ended

    def _begin(self, operation: int | None) -> Session:
        """Begin or resume the run, in a session that kills itself at a file operation if one is given."""
        words = self.run.words(self.out, *self.chance.choice(AGAIN))
        if operation is not None:
            return fork(words, self.log, at_number(self.out, operation, kill))
        return start(words, self.log) if self.chance.random() < STARTED else fork(words, self.log)
