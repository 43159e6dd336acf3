"""Held-out loss, speed and memory of LoRA's variants on the demo's data, at equal trained parameters.

Usage::

    python benchmarks/variants.py --json variants.json                     # the demo's 200 steps, three seeds: hours
    python benchmarks/variants.py --json variants.json --steps 24 --lr 5e-4
    python benchmarks/variants.py --variants lora dora --bits 8 32 --seeds 1

A cell is one run of ``lorakeet demo``'s job with another variant, in its own process. Cells that ``--json`` holds already
are not run again, so the command goes on where it was stopped. The learning rate is the same for all but VeRA, so a variant
that acts like a higher rate may gain by that alone. Losses do not depend on the load of the machine; speeds do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from int8 import show
from lorakeet.cli.demo import JOB

#: Variant -> dotted settings beside the demo's r=16, alpha=32. LoRA-FA trains B alone: its rank of 40, at the same scale
#: of 2, has the trained parameters of rank 16 on layers 576 -> 576 and 576 -> 192. DoRA's magnitudes add 2.5 %.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"lora.use_rslora": True},
    "lora+": {"train.loraplus_ratio": 16},
    "dora": {"lora.use_dora": True},
    "pissa": {"lora.init_lora_weights": "pissa"},
    "olora": {"lora.init_lora_weights": "olora"},
    "loftq": {"lora.init_lora_weights": "loftq"},
    "eva": {"lora.init_lora_weights": "eva"},
    # ranks fall from 24 to a mean of 16, at the same scale of 2
    "adalora": {"lora.adalora_config": {"init_r": 24, "target_r": 16}, "lora.r": 24, "lora.lora_alpha": 48},
    # two vectors a layer, 4 % of the parameters; the authors' rank, and ten times the learning rate
    "vera": {"lora.vera_config": {}, "lora.r": 256, "lora.lora_alpha": 8},
    "lora-fa": {"train.lorafa": True, "lora.r": 40, "lora.lora_alpha": 80},
}
#: Optimizer steps of warm-up, as a share of all: that of the demo.
WARMUP = JOB["train.warmup"] / JOB["train.steps"]
FIRST_SEED = 42


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Train one cell and return its figures."""
    from lorakeet.config import read_run
    from lorakeet.train.run import run_training

    steps = cell["steps"]
    values = {
        **JOB,
        "base.bits": cell["bits"],
        "train.seed": cell["seed"],
        "train.steps": steps,
        "train.warmup": round(WARMUP * steps),
        "train.lr": cell["lr"],
        "train.eval_every": None,
        "train.save_minutes": 0,
        "train.spectrum": False,
        "train.spike": "warn",  # a variant may have gradients of another size
        **VARIANTS[cell["variant"]],
    }
    if "lora.vera_config" in values:
        values["train.lr"] = 10 * cell["lr"]
    if "lora.adalora_config" in values:
        phases = {"tinit": steps // 10, "tfinal": steps // 3}
        values["lora.adalora_config"] = {**values["lora.adalora_config"], **phases}
    with tempfile.TemporaryDirectory() as folder:
        summary = run_training(read_run(None, values={**values, "out": str(Path(folder, "run"))}))
    return {
        "trained parameters": summary["trainable_parameters"],
        "loss before": summary["eval_loss_before"],
        "loss": summary["eval_loss_after"],
        "tokens/s": summary["tokens_per_second"],
        "peak MB": summary["peak_rss_bytes"] / 1e6,
    }


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the settings of all cells; the variants alternate, so that an early stop leaves whole seeds."""
    return [
        {"variant": variant, "bits": bits, "seed": FIRST_SEED + turn, "steps": options.steps, "lr": options.lr}
        for bits in options.bits
        for turn in range(options.seeds)
        for variant in options.variants
    ]


def measured(wanted: list[dict[str, Any]], path: Path | None) -> list[dict[str, Any]]:
    """Return the wanted cells with their figures; run those that the file lacks, and write the file after each."""
    lines: list[dict[str, Any]] = json.loads(path.read_text()) if path and path.exists() else []
    found = []
    for cell in wanted:
        line = next((line for line in lines if cell.items() <= line.items()), None)
        if line is None:
            words = [sys.executable, __file__, "--one", json.dumps(cell)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            line = {**cell, **json.loads(done.stdout.splitlines()[-1])}
            lines.append(line)
            if path:
                path.write_text(json.dumps(lines, indent=1))
            print(json.dumps(line), file=sys.stderr, flush=True)
        found.append(line)
    return found


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each variant: means over the seeds, the range of the loss, and the loss beside plain LoRA's."""
    plain = {line["seed"]: line["loss"] for line in lines if line["variant"] == "lora"}
    rows = []
    for variant in dict.fromkeys(line["variant"] for line in lines):
        own = [line for line in lines if line["variant"] == variant]
        losses = [line["loss"] for line in own]
        apart = [line["loss"] - plain[line["seed"]] for line in own if line["seed"] in plain]
        rows.append(
            {
                "variant": variant,
                "seeds": len(own),
                "trained": own[0]["trained parameters"],
                "loss": f"{statistics.mean(losses):.4f}",
                "range": f"{min(losses):.4f} to {max(losses):.4f}",
                "less lora's": f"{statistics.mean(apart):+.4f}" if apart else "",
                "of it": f"{min(apart):+.4f} to {max(apart):+.4f}" if apart else "",
                "tokens/s": round(statistics.median(line["tokens/s"] for line in own)),
                "peak MB": round(statistics.median(line["peak MB"] for line in own)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--bits", nargs="+", type=int, choices=(8, 32), default=[8], help="of the base's weights")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--steps", type=int, default=JOB["train.steps"], help="optimizer steps of a run")
    parser.add_argument("--lr", type=float, default=JOB["train.lr"], help="peak learning rate")
    parser.add_argument("--json", type=Path, help="file of all cells; those that it holds are not run again")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one)))
        return
    lines = measured(cells(options), options.json)
    for bits in options.bits:
        print(f"\n{bits} bits, {options.steps} steps, peak learning rate {options.lr:g}")
        show(table([line for line in lines if line["bits"] == bits]))


if __name__ == "__main__":
    main()
