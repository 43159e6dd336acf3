"""Cost of what guards a run, as a share of its time: ``python benchmarks/overheads.py``.

One real run of ``lorakeet demo``'s job is timed for some steps, with two checkpoints. The table scales what comes once per
step to 200 steps, and counts the checkpoints of the default interval. Loading and the final evaluation
are in neither column. ``--steps 200`` scales nothing. ``--json`` prints the figures for a machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.cli.demo import JOB
from lorakeet.config import read_run
from lorakeet.config.train import TrainSettings
from lorakeet.train.callbacks.step import StepCallback
from lorakeet.train.checkpoints.resumable import ResumableTrainer
from lorakeet.train.guards import guarded_trainer
from lorakeet.train.run import run_training

#: Steps of the job that the shares refer to.
WHOLE = JOB["train.steps"]
#: Percent. Largest share of the guards, the rehearsal and the checkpoints together.
LIMIT = 3.0


@dataclass
class Clock:
    """Seconds of each call of a function."""

    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def on(self, owner: Any, name: str) -> Iterator[None]:
        """Time the function ``name`` of a class or module."""
        own: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(own)
        def timed(*args: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            try:
                return own(*args, **settings)
            finally:
                self.seconds.append(time.perf_counter() - began)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, own)


def measure(steps: int, out: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Run the job for some steps; return seconds of a whole run, for each kind of overhead and for its steps."""
    step, before, rehearsal, save = (Clock() for _ in range(4))
    values = {**JOB, "train.steps": steps, "train.warmup": steps // 2, "train.save_every": max(steps // 2, 1)}
    config = read_run(None, values={**values, "out": str(out), **settings})
    with ExitStack() as clocks:
        clocks.enter_context(step.on(StepCallback, "on_pre_optimizer_step"))
        clocks.enter_context(before.on(guarded_trainer.GuardedTrainer, "begin_step"))
        clocks.enter_context(rehearsal.on(guarded_trainer, "rehearse"))
        clocks.enter_context(save.on(ResumableTrainer, "_save_checkpoint"))
        summary = run_training(config)
    training = WHOLE * summary["train_seconds"] / steps
    interval = TrainSettings().save_minutes * 60
    saves = int(training // interval) + 1
    checks = step.seconds[0]  # of the first step: gradients of all parameters
    rest = step.seconds[1:] or step.seconds
    return {
        "guards": checks + (WHOLE - 1) * sum(rest) / len(rest) + WHOLE * sum(before.seconds) / steps,
        "rehearsal": sum(rehearsal.seconds),
        "checkpoints": saves * sum(save.seconds) / len(save.seconds),
        "number of checkpoints": saves,
        "steps": training,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="steps that are really run (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("settings", nargs="*", help="further settings of the run, section.key=value")
    args = parser.parse_args()
    settings = dict(word.split("=", 1) for word in args.settings)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.steps, Path(folder) / "run", settings)
    kinds = ("guards", "rehearsal", "checkpoints")
    whole = found["steps"] + found["rehearsal"] + found["checkpoints"]  # the guards are part of the steps
    shares = {kind: 100 * found[kind] / whole for kind in kinds}
    total = sum(shares.values())
    if args.json:
        print(json.dumps({"seconds": found, "percent": {**shares, "together": total}, "measured_steps": args.steps}))
    else:
        print(f"{WHOLE} steps of the demo, {found['steps']:.0f} s (measured: {args.steps} steps)")
        for kind in kinds:
            note = f", {found['number of checkpoints']} of them" if kind == "checkpoints" else ""
            print(f"  {kind:<12} {found[kind]:8.2f} s {shares[kind]:6.2f} %{note}")
        print(f"  {'together':<12} {sum(found[kind] for kind in kinds):8.2f} s {total:6.2f} % (limit {LIMIT:g} %)")
    raise SystemExit(total > LIMIT)


if __name__ == "__main__":
    main()
