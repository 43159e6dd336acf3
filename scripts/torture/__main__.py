"""Torture of training runs: ``make torture``, or ``PYTHONPATH=scripts python -m torture``; half an hour on an idle core.

It has three parts, each on bases of 32 and of 8 bits. Runs are killed and resumed. Files of interrupted runs are damaged.
Disks fail. The exit code is 1 if any run ended with a wrong result, a traceback or half-written files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of this process would not exist in its forks
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

#: Number formats of the base, tortured in turn.
BITS = (32, 8)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="runs that are killed, each up to three times")
    parser.add_argument("--damages", type=int, default=200, help="runs with a damaged file")
    parser.add_argument("--disks", type=int, default=60, help="runs on a disk that fails")
    parser.add_argument("--seed", type=int, default=1, help="seed of moments and damage; the report names it")
    parser.add_argument("--report", type=Path, default=Path("torture.json"), help="JSON file to write")
    return parser.parse_args()


def main() -> int:
    """Run all trials, print each and a table, write the report, and return the exit code."""
    options = arguments()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        os.environ["LORAKEET_HOME"] = str(Path(folder) / "home")
        trials = {name: [] for name in ("kills", "damages", "disks")}
        for name, trial in tortures(Path(folder), options):
            trials[name].append(trial.report())
            print(
                f"{name:8}{len(trials[name]):4}  {'FAULT' if trial.faults else 'ok':6}{shown(trial.report())}",
                flush=True,
            )
    seconds = time.monotonic() - began
    table(trials, seconds)
    report = {"seed": options.seed, "seconds": round(seconds, 1), "trials": trials}
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(trial["faults"] for every in trials.values() for trial in every) else 0


def tortures(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the name of a part and a trial of it, the number formats in turn."""
    from torture.damage import Damager
    from torture.disks import Disks
    from torture.failing_disk import can_mount
    from torture.kills import Killer
    from torture.small_run import SmallRun, furnish

    furnish(folder)
    chance = random.Random(options.seed)
    killers = [Killer(SmallRun(folder, bits), folder / f"bits{bits}", chance) for bits in BITS]
    for killer in killers:
        killer.measure()
        killer.measure_started()
        print(f"bits {killer.run.bits}: a run takes {killer.length}", flush=True)
    parts: dict[str, list[Callable[[], Any]]] = {"kills": [killer.trial for killer in killers]}
    kept = [(killer.run, killer.folder, chance, killer.expected) for killer in killers]
    parts["damages"] = [Damager(*every).trial for every in kept]
    if can_mount():
        parts["disks"] = [Disks(*every).trial for every in kept]
    else:
        print("disks   left out: this process may not mount file systems", flush=True)
    for name, trials in parts.items():
        for number in range(getattr(options, name)):
            yield name, trials[number % len(trials)]()


def shown(report: dict[str, Any]) -> str:
    """Return the figures of a trial in a line."""
    kept = {key: value for key, value in report.items() if value not in ("", [])}
    return ", ".join(f"{key} {value}" for key, value in kept.items())[:LINE]


#: Characters of a trial's line.
LINE = 600


def table(trials: dict[str, list[dict[str, Any]]], seconds: float) -> None:
    """Print what happened in each part, and how often."""
    print(f"\n{'part':10}{'kind':44}{'trials':>8}{'faults':>8}")
    for name, every in trials.items():
        counts, faults = Counter(), Counter()
        for trial in every:
            kinds = [kind(name, trial)]
            counts.update(kinds)
            faults.update(kinds * bool(trial["faults"]))
        for label, count in sorted(counts.items()):
            print(f"{name:10}{label:44}{count:8}{faults[label]:8}")
    killed = trials["kills"]
    moments = Counter(moment["kind"] for trial in killed for moment in trial["kills"])
    print(
        f"\n{sum(moments.values())} kills {dict(moments)}, {sum(trial['in_a_save'] for trial in killed)} inside a save"
    )
    print(f"{seconds:.0f} s, {sum(bool(t['faults']) for e in trials.values() for t in e)} faults")


def kind(name: str, trial: dict[str, Any]) -> str:
    """Return the kind of a trial, for the table."""
    if name == "kills":
        return f"{trial['bits']} bits"
    if name == "damages":
        return f"{trial['damage'].split()[0]}: {trial['outcome']}"
    return f"{trial['fault']}, {trial['place']}: code {trial['code']}"


if __name__ == "__main__":
    sys.exit(main())
