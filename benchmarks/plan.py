"""The plan of a run against the run: predicted and measured peak memory and time of a step, over a grid.

Usage::

    python benchmarks/plan.py                                  # 24 cells and a fit, about 10 minutes on two cores
    python benchmarks/plan.py --models smollm2 --bits 8        # some cells
    python benchmarks/plan.py --json plan.json --fit 1.5GB

Cells: models × bits of the base × length and micro-batch × gradient checkpointing. Each is `lorakeet train` in its own
process with an empty cache of plans. Its ``summary.json`` has both figures: the plan of the first seconds, before the base
was loaded, and what was measured. ``smollm2`` is the default base; ``gpt2`` and ``bert`` are models of that kind with random
weights, a language model and a classifier. At last a run that needs more is fitted with `lorakeet plan --fit`, and its peak
is compared with the limit. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakeet.config import DEFAULT_MODEL
from lorakeet.plan.fit import bytes_of

MODELS = ("smollm2", "gpt2", "bert")
#: Tokens of the longest sample, and samples of a micro-batch.
SHAPES = ((96, 4), (384, 1))
STEPS, ACCUMULATED, ROWS = 8, 2, 48
#: Peak learning rate: labels are random, and at the default rate a run may diverge, which is an error.
RATE = 1e-6
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
)
#: Goals: errors of peak memory and of the time of a step.
GOALS = {"memory": 0.10, "time": 0.20}

Cell = dict[str, Any]


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells of the grid."""
    for model, bits, (length, batch), checkpointing in itertools.product(
        options.models, options.bits, SHAPES, (False, True)
    ):
        yield {"model": model, "bits": bits, "length": length, "batch": batch, "checkpointing": checkpointing}


def make_model(kind: str, folder: Path) -> str:
    """Save a random model of a kind with the default base's tokenizer, and return what to pass as ``--model``."""
    if kind == "smollm2":
        return DEFAULT_MODEL
    import transformers as tf

    from lorakeet.base.load import inspect_model
    from lorakeet.config import BaseSettings

    tokenizer = inspect_model(BaseSettings()).tokenizer
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    made: Any
    if kind == "gpt2":
        made = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=640, n_layer=8, n_head=10, n_positions=512, **ids))
    else:
        size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
        made = tf.BertForMaskedLM(tf.BertConfig(**size, **ids))
    made.save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    return str(folder / kind)


def write_data(path: Path, length: int) -> None:
    """Write rows of half to all of ``length`` words, each with a label."""
    draw = random.Random(length)
    with path.open("w", encoding="utf-8") as file:
        for row in range(ROWS):
            text = " ".join(draw.choices(WORDS, k=draw.randint(length // 2, length)))
            file.write(json.dumps({"text": text, "label": ("one", "two")[row % 2]}) + "\n")


def words_of(cell: Cell, model: str, folder: Path) -> list[str]:
    """Return the settings of a cell, as words of `lorakeet train` and `lorakeet plan`."""
    data = folder / f"{cell['length']}.jsonl"
    if not data.exists():
        write_data(data, cell["length"])
    task = "SEQ_CLS" if cell["model"] == "bert" else "CAUSAL_LM"
    flags = {"model": model, "bits": cell["bits"], "task": task, "data": data, "max-length": cell["length"]}
    flags |= {"batch-size": cell["batch"], "grad-accum": ACCUMULATED, "steps": STEPS, "lr": RATE}
    flags |= {"device": "cpu", "r": 16}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [
        *words,
        *("--target-modules", "all-linear"),
        f"train.gradient_checkpointing={str(cell['checkpointing']).lower()}",
    ]


def lorakeet(command: str, words: list[str], folder: Path) -> None:
    """Run a command to its end, with an empty cache of plans.

    Raises:
        SystemExit: It failed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lorakeet", command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
    )
    if done.returncode:
        raise SystemExit(f"{command} {' '.join(words)}: exit code {done.returncode}\n{done.stdout[-2000:]}")


def forget_plans() -> None:
    """Remove the cached costs of passes, so that a run measures them itself."""
    from lorakeet.files import cache_home

    for file in (cache_home() / "plans").glob("*.json"):
        file.unlink(missing_ok=True)


def measure(words: list[str], folder: Path, name: str) -> dict[str, Any]:
    """Train, and return the figures of its summary."""
    out = folder / name
    forget_plans()
    began = time.perf_counter()
    lorakeet("train", [*words, "--out", str(out)], folder)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    keys = ("planned_peak_bytes", "peak_rss_bytes", "planned_step_seconds", "step_seconds")
    return {key: summary[key] for key in keys} | {"seconds": time.perf_counter() - began}


def errors(found: dict[str, Any]) -> dict[str, float]:
    """Return the errors of prediction, as shares of what was measured."""
    return {
        "memory": found["planned_peak_bytes"] / found["peak_rss_bytes"] - 1,
        "time": found["planned_step_seconds"] / found["step_seconds"] - 1,
    }


def line_of(cell: Cell, found: dict[str, Any]) -> str:
    """Return the line of a cell."""
    off = errors(found)
    return (
        f"{cell['model']:<8} {cell['bits']:>4} {cell['length']:>6} {cell['batch']:>5} {cell['checkpointing']!s:>6} "
        f"{found['planned_peak_bytes'] / 1e6:>9.0f} {found['peak_rss_bytes'] / 1e6:>9.0f} {off['memory']:>+7.1%} "
        f"{found['planned_step_seconds']:>8.2f} {found['step_seconds']:>8.2f} {off['time']:>+7.1%}"
    )


def check_fit(limit: str, model: str, folder: Path) -> dict[str, Any]:
    """Fit a run that needs more into ``limit``, and return the limit, the changes and the measured peak."""
    cell = {"model": "smollm2", "bits": 32, "length": 384, "batch": 8, "checkpointing": False}
    words = [word for word in words_of(cell, model, folder) if "checkpointing" not in word]
    lorakeet(
        "plan",
        [*words, "--out", str(folder / "fitted"), "--fit", limit, "--write", str(folder / "fitted.yaml")],
        folder,
    )
    lorakeet("train", [str(folder / "fitted.yaml")], folder)
    summary = json.loads((folder / "fitted" / "summary.json").read_text(encoding="utf-8"))
    return {"limit": bytes_of(limit), "peak_rss_bytes": summary["peak_rss_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--bits", nargs="+", type=int, choices=(8, 32), default=(8, 32))
    parser.add_argument("--fit", default="1.5GB", help="limit of the fit; empty: no fit")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    kept: dict[str, Any] = {"cells": [], "fit": None}
    print("model    bits length batch layers again    plan MB   true MB   error   plan s   true s   error", flush=True)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        made = {kind: make_model(kind, folder) for kind in options.models}
        for number, cell in enumerate(cells(options)):
            found = measure(words_of(cell, made[cell["model"]], folder), folder, f"run-{number}")
            kept["cells"].append(cell | found)
            print(line_of(cell, found), flush=True)
        if options.fit:
            kept["fit"] = check_fit(options.fit, DEFAULT_MODEL, folder)
    for what, goal in GOALS.items():
        off = [abs(errors(found)[what]) for found in kept["cells"]]
        print(f"{what}: worst error {max(off):.1%}, {sum(one <= goal for one in off)} of {len(off)} within {goal:.0%}")
    if kept["fit"]:
        print(f"fit: {kept['fit']['peak_rss_bytes'] / 1e9:.2f} GB of {kept['fit']['limit'] / 1e9:.2f} GB")
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
