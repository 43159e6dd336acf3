"""Damage to the files of an interrupted run, and the check that no resumed run goes wrong without a word.

Any file of a checkpoint or of the run itself is damaged. A bit flips, the end is missing, or a part is zero as after a power
failure. The file is empty or missing, or has changed places with that of another checkpoint.
"""

from __future__ import annotations

import random
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torture.kills import SHOWN
from torture.operations import at_each, kill
from torture.sessions import Ended, fork
from torture.small_run import SmallRun, differences, results

#: Kinds of damage, and how often each is drawn.
KINDS = {"flip": 8, "truncate": 5, "zeros": 2, "remove": 2, "empty": 1, "swap": 2}
#: Share of the damage that falls on the newest checkpoint, since a resumed run reads no other one while it is whole.
NEWEST = 0.75
#: Bytes of a part that is zero: a sector of a disk.
SECTOR = 512


@dataclass
class Trial:
    """A damaged file, and how the resumed run took it.

    Attributes:
        file: Its path in the run's folder.
        damage: Kind and place of the damage.
        outcome: ``error``, ``an earlier checkpoint`` or ``from the beginning``; ``not read``: the newest checkpoint was used.
        faults: Reasons for which the outcome is wrong.
    """

    bits: int
    file: str
    damage: str
    outcome: str
    faults: list[str]

    def report(self) -> dict[str, Any]:
        """Return the trial as JSON."""
        return asdict(self)


def damage(kind: str, file: Path, chance: random.Random) -> str:
    """Write damage into a file, and return its description."""
    content = bytearray(file.read_bytes())
    place = chance.randrange(max(len(content), 1))
    if kind == "remove":
        file.unlink()
        return "removed"
    if kind == "swap" and (others := [path for path in file.parent.parent.glob(f"*/{file.name}") if path != file]):
        first = others[0].read_bytes()
        others[0].write_bytes(content)
        file.write_bytes(first)
        return f"swapped with {others[0].parent.name}"
    if kind == "truncate":
        del content[place:]
    elif kind == "zeros":
        content[place : place + SECTOR] = bytes(len(content[place : place + SECTOR]))
    elif kind in ("flip", "swap") and content:
        content[place] ^= 1 << chance.randrange(8)
    else:
        content.clear()
    file.write_bytes(content)
    return f"{kind} at byte {place}"


class Damager:
    """Runs of one kind that are interrupted, damaged and resumed.

    Args:
        run: The command.
        folder: Folder of the runs and their logs.
        chance: Source of the damage.
        expected: Results of the undisturbed run.
        last: Step of the newest checkpoint of the interrupted run.
    """

    def __init__(
        self, run: SmallRun, folder: Path, chance: random.Random, expected: dict[str, Any], last: int = 12
    ) -> None:
        self.run, self.chance, self.expected, self.newest = run, chance, expected, f"checkpoint-{last}"
        self.out, self.torn, self.log = folder / "run", folder / "torn", folder / "session.log"

    def interrupt(self) -> None:
        """Start the run, let it be killed right after a checkpoint, and keep its folder.

        Raises:
            RuntimeError: It ends in another way.
        """
        shutil.rmtree(self.out, ignore_errors=True)
        last = self.out / "checkpoints" / self.newest
        before = at_each(self.out, lambda _: kill() if last.exists() else None)
        ended = fork(self.run.words(self.out), self.log, before).wait()
        if not ended.killed:
            raise RuntimeError(f"no kill after {self.newest}: {ended.said}")
        shutil.rmtree(self.torn, ignore_errors=True)
        shutil.move(self.out, self.torn)

    def files(self) -> list[str]:
        """Return the files of the interrupted run, by their paths in its folder."""
        return sorted(str(path.relative_to(self.torn)) for path in self.torn.rglob("*") if path.is_file())

    def any_file(self) -> str:
        """Return a file of the interrupted run, mostly one of the newest checkpoint."""
        newest = [name for name in self.files() if self.newest in name]
        return self.chance.choice(newest if self.chance.random() < NEWEST else self.files())

    def trial(self, name: str | None = None, kind: str | None = None) -> Trial:
        """Run one session on a damaged file, and judge how it ends.

        Args:
            name: The file; default: any.
            kind: The kind of damage; default: any.
        """
        if not self.torn.exists():
            self.interrupt()
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.torn, self.out)
        name = name or self.any_file()
        kind = kind or self.chance.choices(list(KINDS), list(KINDS.values()))[0]
        told = damage(kind, self.out / name, self.chance)
        ended = fork(self.run.words(self.out, "--resume"), self.log).wait()
        outcome, faults = self.judge(name, ended)
        return Trial(self.run.bits, name, told, outcome, faults)

    def judge(self, name: str, ended: Ended) -> tuple[str, list[str]]:
        """Return the outcome of a resumed run and its faults."""
        if ended.crashed or ended.code not in (0, 2):
            return "crash", [f"code {ended.code}: {ended.said[-SHOWN:]}"]
        if ended.code == 2:
            return "error", []
        if not (self.out / "summary.json").exists():
            return "not finished", [ended.said[-SHOWN:]]
        faults = differences(self.expected, results(self.out))
        start = re.search(r"^continuing .*/(checkpoint-\d+)$", ended.said, re.M)
        if start and start[1] == self.newest:
            return "not read", faults
        warned = [line for line in ended.said.splitlines() if line.startswith("warning: ") and self.newest in line]
        if not warned:
            faults.append(f"{name} is damaged, and no warning says that {self.newest} was left out")
        return "an earlier checkpoint" if start else "from the beginning", faults
