"""Training beside PEFT with ``transformers.Trainer`` and TRL's ``SFTTrainer``: speed, wall time, memory and losses.

Usage::

    python benchmarks/training.py                                      # both jobs, all contenders
    python benchmarks/training.py --checkpointing                      # the same with gradient checkpointing in all
    python benchmarks/training.py --jobs quotations --steps 200 --rounds 1     # the demo's whole job

Jobs: ``quotations`` is the demo's, 4 × 4 short samples a step, r=16 on q_proj and v_proj; in ``full`` every sample has 1,024
tokens, 1 × 2 a step. Contenders: PEFT in fp32, bf16, and on an 8-bit base of bitsandbytes; TRL in fp32 without padding;
Lorakeet as ``lorakeet train`` runs. Equal for all: base, starting adapter, samples of every step, optimizer, learning rate,
clipping, threads. Each training is a process with empty caches. Contenders alternate, and medians over the rounds count.

- tokens/s: real tokens (no padding) per second, without the first fifth of the steps.
- wall s: the whole process, with imports, compilation, reading, training and saving the adapter.
- peak GB: peak resident memory of the process.
- held out: loss of the saved adapter on quotations outside the training data, measured afterwards by training_rows.py.
- Δ loss: largest difference of a step's loss from the first contender's; dropout masks differ.

Numbers in brackets compare with the first contender: speed-up, shortening, share of its memory. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakeet.cli.demo import JOB as DEMO
from lorakeet.config import read_run

HERE = Path(__file__).parent
CONTENDERS = ("peft", "peft-bf16", "peft-int8", "trl", "lorakeet", "lorakeet-bf16", "lorakeet-int8")
JOBS: dict[str, dict[str, Any]] = {
    "quotations": {"train.steps": 12},
    "full": {"train.steps": 4, "train.batch_size": 1, "train.grad_accum": 2, "data.max_length": 1024},
}
PACKAGES = ("lorakeet", "peft", "trl", "bitsandbytes", "transformers", "accelerate", "torch")
FEATURES = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm"}
CACHES = ("LORAKEET_HOME", "HF_DATASETS_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
Figures = dict[str, Any]


class FailedError(Exception):
    """Failure of a training, with the last line of its output."""


def job_settings(job: str, steps: int | None, checkpointing: bool) -> dict[str, Any]:
    """Return the demo's settings with those of a job, by dotted name, without a held-out part."""
    settings = {name: value for name, value in DEMO.items() if name != "train.eval_every"} | JOBS[job]
    steps = steps or settings["train.steps"]
    return settings | {
        "base.bits": None,
        "data.eval_fraction": 0,
        "train.steps": steps,
        "train.warmup": steps // 2,  # the demo's share
        "train.gradient_checkpointing": checkpointing,
        "base.device": "cpu",
    }


def ask(*words: str) -> Any:
    """Run ``training_rows.py`` and return its JSON."""
    command = [sys.executable, str(HERE / "training_rows.py"), *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def run_process(words: list[str], folder: Path) -> tuple[float, int]:
    """Run a Python program to its end, with its caches and its output below ``folder``.

    Returns:
        Seconds from start to end, and peak resident bytes.
    """
    caches = {name: str(folder / name.lower()) for name in CACHES}
    said = folder / "said.txt"
    began = time.perf_counter()
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **caches},
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
        raise FailedError(f"exit code {process.returncode}, last words: {lines[-1] if lines else 'none'}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(name: str, settings: dict[str, Any], folder: Path, start: Path | None = None) -> Figures:
    """Train one contender in its own process and return its figures.

    Args:
        name: Contender.
        settings: Settings of the run, by dotted name.
        folder: New folder of the run and its adapter.
        start: Adapter to start from, for contenders other than Lorakeet.

    Raises:
        FailedError: The process failed.
    """
    library, _, kind = name.partition("-")
    out = folder / "run"
    number = {"base.dtype": "bf16" if kind == "bf16" else "fp32", "base.bits": 8 if kind == "int8" else None}
    run = read_run(None, values={**settings, **number, "out": str(out)})
    folder.mkdir()
    file = folder / "run.yaml"
    file.write_text(run.to_yaml(), encoding="utf-8")
    if library == "lorakeet":
        words = ["-m", "lorakeet", "train", str(file)]
    else:
        words = [str(HERE / "training_peers.py"), library, str(file), str(start), str(out)]
    seconds, resident = run_process(words, folder)
    every = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in every if "loss" in line]  # those of optimizer steps
    settled = lines[max(1, len(lines) // 5) - 1]
    done = {key: lines[-1][key] - settled[key] for key in ("tokens", "seconds")}
    return {
        "tokens_per_second": done["tokens"] / done["seconds"] if done["seconds"] else float("nan"),
        "wall_seconds": seconds,
        "peak_gb": resident / 1e9,
        "tokens": [line["tokens"] for line in lines],
        "losses": [line["loss"] for line in lines],
    }


def compare(job: str, settings: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the contenders in turns over the rounds, and return all figures of one job; a failed one is not run again.

    Args:
        job: Name of the job.
        settings: Its settings, by dotted name.
        folder: Temporary folder.
        options: Command line.
    """
    tokens = str(read_run(None, values=settings).data.max_length)
    rows = ask("rows", job, str(folder), "--fraction", str(DEMO["data.eval_fraction"]), "--tokens", tokens)
    settings = {**settings, "base.model": rows["base"], "data.path": str(folder / "train.jsonl")}
    # Warm-up starts at a learning rate of 0, so one step leaves the initial adapter of this seed.
    train("lorakeet", {**settings, "train.steps": 1, "train.warmup": 1}, folder / "start")
    start = folder / "start" / "run" / "adapter"
    runs: dict[str, list[Figures]] = {name: [] for name in options.contenders}
    faults: dict[str, str] = {}
    adapters = {"start": start}
    for turn in range(options.rounds):
        for name in options.contenders:
            if name in faults:
                continue
            here = folder / f"{name}-{turn}"
            try:
                runs[name].append(train(name, settings, here, start))
            except FailedError as error:
                faults[name] = str(error)
            adapters.setdefault(name, here / "run" / "adapter")
            told = faults.get(name) or f"{runs[name][-1]['tokens_per_second']:.1f} tokens/s"
            print(f"{job}, round {turn + 1} of {options.rounds}, {name}: {told}", file=sys.stderr, flush=True)
    adapters = {name: str(adapter) for name, adapter in adapters.items() if name not in faults}
    try:
        losses = ask("losses", rows["base"], str(folder / "held_out.jsonl"), *adapters.values(), "--tokens", tokens)
    except subprocess.CalledProcessError as error:  # keep the figures measured so far
        print(f"no held-out losses: {error}", file=sys.stderr)
        losses = dict.fromkeys(adapters.values(), float("nan"))
    held_out = {name: losses[adapter] for name, adapter in adapters.items()}
    return {"job": job, "settings": settings, "rows": rows, "runs": runs, "faults": faults, "held_out": held_out}


def table(found: dict[str, Any], contenders: Sequence[str]) -> Iterator[str]:
    """Yield a line for each contender: medians, and ratios to the first one that did not fail."""
    columns = {"tokens_per_second": "9.1f", "wall_seconds": "8.1f", "peak_gb": "8.2f"}
    yield f"{'':14} {'tokens/s':>9}{'':9}{'wall s':>8}{'':9}{'peak GB':>8}{'':9}{'held out':>9} {'Δ loss':>8}"
    first: list[Figures] = []
    for name in contenders:
        if fault := found["faults"].get(name):
            yield f"{name:14} failed: {fault}"
            continue
        runs = found["runs"][name]
        first = first or runs
        cells = ""
        for column, form in columns.items():
            value, other = (statistics.median(run[column] for run in some) for some in (runs, first))
            ratio = other / value if column == "wall_seconds" else value / other
            cells += f"{value:{form}} {f'({ratio:.2f})':8}"
        if runs[0]["tokens"] == first[0]["tokens"]:
            off = max(abs(a - b) for a, b in zip(runs[0]["losses"], first[0]["losses"], strict=True))
            told = f"{off:8.4f}"
        else:
            told = "learned from other samples"
        yield f"{name:14} {cells}{found['held_out'][name]:9.4f} {told}"


def heading(found: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines about the job and about what is equal for all."""
    run = read_run(None, values=found["settings"])
    train, lora, rows = run.train, run.lora, found["rows"]
    checkpointing = "with" if train.gradient_checkpointing else "without"
    yield f"{found['job']}, {checkpointing} gradient checkpointing: {train.batch_size} x {train.grad_accum} samples a step"
    yield f"{train.steps} steps, {options.rounds} rounds, medians; sample of at most {run.data.max_length} tokens"
    for part, name in (("train", "to learn"), ("held_out", "held out")):
        one = rows[part]
        lengths = f"{one['shortest']} to {one['longest']}, median {one['median']}"
        yield f"{name}: {one['rows']:,} samples, {one['tokens']:,} tokens ({lengths})"
    yield (
        f"equal for all: r={lora.r}, alpha={lora.lora_alpha:g}, dropout {lora.lora_dropout:g} on "
        f"{' and '.join(lora.target_modules or ())}; AdamW, learning rate {train.lr:g} ({train.schedule}, "
        f"{train.warmup} steps of warm-up), clipping at {train.max_grad_norm:g}, seed {train.seed}"
    )
    yield f"held-out loss of the starting adapter: {found['held_out']['start']:.4f}"


def machine(rows: dict[str, Any]) -> dict[str, Any]:
    """Return versions, and the processor's instruction sets."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "versions": versions,
        "processor": platform.machine(),
        "features": sorted(words & FEATURES),
        "threads": rows["threads"],
        "capability": rows["capability"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in all contenders")
    parser.add_argument("--steps", type=int, help="optimizer steps, at least 2; left out: those of the job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure of every run to this file, too")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 2:
        parser.error("the first step is left out of the speed: --steps 2 or more")
    kept: dict[str, Any] = {"jobs": []}
    for job in options.jobs:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(job, job_settings(job, options.steps, options.checkpointing), Path(folder), options)
        print("", *heading(found, options), *table(found, options.contenders), sep="\n", flush=True)
        kept["machine"] = machine(found["rows"])
        kept["jobs"].append(found)
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    on = kept["machine"]
    print("\n" + ", ".join(f"{name} {version}" for name, version in on["versions"].items()))
    print(f"{on['processor']} ({' '.join(on['features'])}), torch uses {on['capability']}, {on['threads']} threads")
    if "trl" in options.contenders:
        print(
            "trl: padding_free=True, samples told apart by position ids; its packing would change the samples of a step"
        )


if __name__ == "__main__":
    main()
