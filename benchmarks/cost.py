"""Cost of a training step by samples, length, rank and adapted layers, and its time by kind of work.

Usage::

    python benchmarks/cost.py --plot cost.svg                      # all parts
    python benchmarks/cost.py --parts samples lengths --bits 8     # some, with a base in 8 bits alone
    python benchmarks/cost.py --parts profile

A step is forward, backward and AdamW on the default base with r=16 on q_proj and v_proj. It is one pass, as in a run, over
random tokens. Every point is measured in its own process, in three stages: a step of eight tokens touches all weights, one
of the point's size warms up, and up to ``--repeats`` are timed. No step starts after ``--seconds``. The median counts.
"rest" is the resident memory after the first stage, "peak" the most after that (Linux). Lines are printed as they are
measured, and the plot grows with each part. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import step_profile
from training_step import Point, as_a_run, make_batch, make_model, make_step

PARTS = ("samples", "lengths", "ranks", "layers", "profile")
SAMPLES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
RANKS = (4, 16, 64, 256)
ATTENTION_INPUTS = ["q_proj", "v_proj"]
#: 16 samples of 32 tokens; a bare number of bits is that of the base's weights.
POINT: Point = {"bits": 32, "samples": 16, "length": 32, "spread": 0.0, "rank": 16, "layers": ATTENTION_INPUTS}


def points(part: str, options: argparse.Namespace) -> Iterator[Point]:
    """Yield the points of a part; the number formats alternate."""
    changed: dict[str, list[Point]] = {
        "samples": [{"samples": n} for n in SAMPLES],
        "lengths": [{"samples": 1, "length": n} for n in LENGTHS],
        "ranks": [{"rank": r} for r in RANKS],
        "layers": [{"layers": layers} for layers in (ATTENTION_INPUTS, "all-linear")],
        # lengths as spread as those of quotations: nearly all different
        "profile": [{"samples": 16, "length": 40, "spread": 0.8}],
    }
    for change in changed[part]:
        for bits in options.bits:
            point = {**POINT, **change, "bits": bits}
            if point["samples"] * point["length"] <= options.most:
                yield point


# ---- one point, in its own process -------------------------------------------------------------------------------


def resident(what: str) -> float:
    """Return ``VmRSS`` (now) or ``VmHWM`` (the most since :func:`forget_peak`) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(what))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(point: Point, options: argparse.Namespace) -> dict[str, float]:
    """Measure time and memory of one point."""
    model = make_model(point)
    step, batch = make_step(model), make_batch(point["samples"], point["length"], point["spread"])
    tokens = int(batch["attention_mask"].sum())
    times = []
    with as_a_run(model):
        step(make_batch(1, 8, 0.0))
        gc.collect()
        rest = resident("VmRSS")
        forget_peak()
        began = time.perf_counter()
        step(batch)
        while len(times) < options.repeats and (not times or time.perf_counter() - began < options.seconds):
            mark = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - mark)
    took, peak = statistics.median(times), resident("VmHWM")
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "tokens": tokens,
        "ms": 1000 * took,
        "tokens/s": tokens / took,
        "timed": len(times),
        "rest MB": rest,
        "peak MB": peak,
        "KB/token": 1000 * (peak - rest) / tokens,
        "learns": learns,
    }


# ---- the tables --------------------------------------------------------------------------------------------------

COLUMNS = ("bits", "samples", "length", "rank", "layers")


def in_new_process(point: Point, options: argparse.Namespace, part: str) -> dict[str, Any] | None:
    """Return the figures of a point, or None if it failed; the reason is on stderr."""
    words = [sys.executable, __file__, "--parts", part, "--one", json.dumps(point)]
    words += ["--repeats", str(options.repeats), "--seconds", str(options.seconds)]
    quiet = {**os.environ, "KINETO_LOG_LEVEL": "5"}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=quiet)
    found: dict[str, Any] | None = None if done.returncode else json.loads(done.stdout.splitlines()[-1])
    return found


def print_part(part: str, options: argparse.Namespace) -> list[Point]:
    """Measure the points of a part and print a line for each; return points and figures."""
    found: list[Point] = []
    print(f"\n{part}")
    for point in points(part, options):
        figures = in_new_process(point, options, part)
        if figures is None:
            print(f"failed: {point}", flush=True)
            continue
        line = {**point, **figures}
        line["layers"] = line["layers"] if isinstance(line["layers"], str) else ",".join(line["layers"])
        shown = {k: v for k, v in line.items() if k != "spread"}
        if not found:
            print(" ".join(f"{name:>13}" if name == "layers" else f"{name:>9}" for name in shown))
        cells = [f"{v:.1f}" if isinstance(v, float) else str(v) for v in shown.values()]
        widths = [13 if name == "layers" else 9 for name in shown]
        print(" ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)
        found.append(line)
    if part in ("samples", "lengths"):
        print_growth(found)
    return found


def print_growth(found: list[Point], least: int = 256) -> None:
    """Print the exponent k of tokens^k, by least squares over the logarithms: 1 is linear, 2 quadratic."""
    from math import log

    for bits in sorted({line["bits"] for line in found}):
        large = [line for line in found if line["bits"] == bits and line["tokens"] >= least]
        if len(large) < 3:
            continue
        tokens = [log(line["tokens"]) for line in large]
        time_k = statistics.linear_regression(tokens, [log(line["ms"]) for line in large]).slope
        beyond = [log(max(line["peak MB"] - line["rest MB"], 1)) for line in large]
        memory_k = statistics.linear_regression(tokens, beyond).slope
        print(
            f"{bits} bits, from {least} tokens: time as tokens^{time_k:.2f}, memory beyond rest as tokens^{memory_k:.2f}"
        )


def draw(found: dict[str, list[Point]], path: Path) -> None:
    """Draw tokens per second (above) and memory beyond rest (below) against samples, length and rank."""
    from matplotlib.figure import Figure

    against = {"samples": "samples", "lengths": "length", "ranks": "rank"}
    titles = {"samples": "samples in a step", "lengths": "tokens of the one sample", "ranks": "rank"}
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots(2, 3, sharex="col", sharey="row", squeeze=False)
    for column, (part, key) in enumerate(against.items()):
        for bits, colour, mark in ((32, "#08519c", "o"), (8, "#d94801", "s")):
            lines = [line for line in found.get(part, []) if line["bits"] == bits]
            if not lines:
                continue
            style = {"color": colour, "marker": mark, "markersize": 5, "label": f"{bits} bits"}
            x = [line[key] for line in lines]
            axes[0, column].plot(x, [line["tokens/s"] for line in lines], **style)
            beyond = [max(line["peak MB"] - line["rest MB"], 1) for line in lines]
            axes[1, column].plot(x, beyond, **style)
            if part != "ranks" and bits == min(line["bits"] for line in found[part]):
                straight = [beyond[-1] * one / x[-1] for one in x]
                axes[1, column].plot(x, straight, ":", color="#595959", linewidth=1, label="in proportion")
        axes[1, column].set_xlabel(titles[part])
    for ax in axes.flat:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("tokens per second")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylabel("memory beyond rest, MB")
    axes[1, 0].set_yscale("log")
    shown = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, frameon=False, ncols=3, loc="outside upper right")
    figure.suptitle("A training step of Lorakeet on SmolLM2-135M", x=0.01, ha="left", fontweight="bold")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--bits", nargs="+", type=int, choices=(32, 8), default=(32, 8), help="of the base's weights")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a point, at most")
    parser.add_argument("--seconds", type=float, default=15.0, help="no step of a point starts later than this")
    parser.add_argument("--most", type=int, default=max(LENGTHS), help="leave out steps of more tokens")
    parser.add_argument("--plot", type=Path, help="draw samples, lengths and ranks into this file, such as cost.svg")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work = step_profile.profile if options.parts == ["profile"] else measure
        print(json.dumps(work(options.one, options)))
        return
    import torch
    import transformers

    import lorakeet
    from lorakeet.kernels.int8.registry import best_on

    print(f"lorakeet {lorakeet.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, int8: {best_on('cpu').name}")
    found: dict[str, list[Point]] = {}
    for part in options.parts:
        if part == "profile":
            seen = {point["bits"]: in_new_process(point, options, part) for point in points(part, options)}
            step_profile.show({bits: figures for bits, figures in seen.items() if figures})
            continue
        found[part] = print_part(part, options)
        if options.plot:
            draw(found, options.plot)


if __name__ == "__main__":
    main()
