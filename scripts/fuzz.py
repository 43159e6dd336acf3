"""Fuzz everything that reads files of strangers, guided by coverage (atheris); see docs/security.md.

``python scripts/fuzz.py --minutes 60`` gives each target an equal share. A finding is minimized and kept as a seed in
``tests/fuzzing/seeds``, which the tests replay; the exit code is 1 then. ``--target`` chooses targets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEEDS = ROOT / "tests" / "fuzzing" / "seeds"
#: Seconds after which a target gets a new process.
PERIOD = 150
#: Bytes of the largest input.
LARGEST = 1 << 17
NAMES = ("adapter", "base", "gguf", "run", "settings", "data", "template")


def main() -> int:
    """Parse the command line and fuzz; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="in all, over the targets")
    parser.add_argument("--target", action="append", choices=NAMES, help="only this one; may be repeated")
    parser.add_argument("--report", type=Path, default=ROOT / ".fuzz" / "report.json", help="executions and findings")
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)  # of the one target of a child process
    options = parser.parse_args()
    if options.seconds:
        fuzz_one(options.target[0], options.seconds, options.report)
        return 0
    report = fuzz_all(options.target or list(NAMES), 60 * options.minutes, options.report)
    for name, figures in report.items():
        print(
            f"{name:10}{figures['executions']:>10,} inputs in {figures['seconds']:,} s, {figures['findings']} findings"
        )
    return 1 if any(figures["findings"] for figures in report.values()) else 0


def fuzz_all(names: list[str], seconds: float, report: Path) -> dict[str, Any]:
    """Fuzz the targets in turn, each for a while in a process of its own; add their figures to ``report``."""
    report.parent.mkdir(parents=True, exist_ok=True)
    left = dict.fromkeys(names, seconds / len(names))
    while any(rest > 1 for rest in left.values()):
        for name in names:
            share = int(min(PERIOD, left[name]))
            if share > 1:
                _run_child(name, share, report)
            left[name] -= share
    return json.loads(report.read_text()) if report.exists() else {}


def _run_child(name: str, seconds: int, report: Path) -> None:
    words = [sys.executable, __file__, "--target", name, "--seconds", str(seconds), "--report", str(report)]
    paths = [str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    inputs = sorted((report.parent / name).glob("current"))
    if code and inputs:  # the process died: what it was reading is a finding
        _keep(report, name, inputs[0].read_bytes(), f"the process ended with {code}")
        _add(report, name, 0, seconds, 1)


def fuzz_one(name: str, seconds: int, report: Path) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris
    import datasets  # noqa: F401 - the large packages come first: an import under instrumentation is slow
    import transformers  # noqa: F401

    logging.getLogger("lorakeet").addHandler(logging.NullHandler())
    logging.getLogger("lorakeet").propagate = False
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["lorakeet"]):
        from fuzzing.judge import Arena, judge
        from fuzzing.mutate import mutate
        from fuzzing.targets import target
    chosen, arena, corpus = target(name), Arena(), report.parent / name
    corpus.mkdir(parents=True, exist_ok=True)
    for example in (*chosen.examples(), *(path.read_bytes() for path in (SEEDS / name).glob("*"))):
        (corpus / hashlib.sha256(example).hexdigest()[:16]).write_bytes(example)
    known: set[tuple[str, str]] = set()
    begin, count = time.monotonic(), 0

    def test(data: bytes) -> None:
        nonlocal count
        count += 1
        (corpus / "current").write_bytes(data)
        finding = judge(chosen.run, data, arena)
        if finding and (finding.kind, finding.detail) not in known:
            known.add((finding.kind, finding.detail))
            smaller = minimized(data, lambda part: judge(chosen.run, part, arena) == finding)
            _keep(report, name, smaller, f"{finding.kind}: {finding.detail}\n{finding.trace}")
        if time.monotonic() - begin > seconds:
            (corpus / "current").unlink()
            arena.close()
            _add(report, name, count, round(time.monotonic() - begin), len(known))
            os._exit(0)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return atheris.Mutate(data, most) if rng.random() < 0.1 else mutate(data, rng, min(most, LARGEST), chosen.links)

    options = [f"-max_len={LARGEST}", "-timeout=60", "-rss_limit_mb=6000", f"-artifact_prefix={corpus}/", str(corpus)]
    atheris.Setup([sys.argv[0], *options], test, custom_mutator=mutator)
    atheris.Fuzz()


def minimized(data: bytes, fails: Any, seconds: float = 10) -> bytes:
    """Return a smaller input that still ``fails``: halves, quarters and so on are left out while it does."""
    end, size = time.monotonic() + seconds, len(data) // 2
    while size and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            part = data[:at] + data[at + size :]
            if fails(part):
                data = part
            else:
                at += size
        size //= 2
    return data


def _keep(report: Path, name: str, data: bytes, what: str) -> None:
    """Write a finding as a seed, and say what it was in ``findings.txt`` beside the report."""
    folder = SEEDS / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    with (report.parent / "findings.txt").open("a") as log:
        log.write(f"== {name} {path.name} {what}\n")


def _add(report: Path, name: str, executions: int, seconds: int, findings: int) -> None:
    figures = json.loads(report.read_text()) if report.exists() else {}
    before = figures.get(name, {"executions": 0, "seconds": 0, "findings": 0})
    now = {"executions": executions, "seconds": seconds, "findings": findings}
    figures[name] = {key: before[key] + now[key] for key in now}
    report.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
