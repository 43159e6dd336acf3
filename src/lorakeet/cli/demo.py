"""``lorakeet demo``"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.options import with_settings
from lorakeet.config import QUANTIZED_FORMATS, RunConfig, read_run
from lorakeet.errors import LorakeetError, OutputError
from lorakeet.log import info
from lorakeet.runs.run_folder import is_finished

#: Dotted setting -> value: r=16 on query and value projections, 200 steps of 4 × 4 quotations, an 8-bit base.
JOB: dict[str, Any] = {
    "base.bits": 8,
    "lora.r": 16,
    "lora.lora_alpha": 32,
    "lora.lora_dropout": 0.05,
    "lora.target_modules": ["q_proj", "v_proj"],
    "data.path": "fortunes",
    "data.eval_fraction": 0.01,  # 123 quotations, about 5,000 tokens
    "train.steps": 200,
    "train.warmup": 100,
    "train.lr": 2e-4,
    "train.eval_every": 50,
    "train.batch_size": 4,
    "train.grad_accum": 4,
    "out": "demo-run",
}
#: Prompts that are completed before and after training.
OPENINGS = ["Two things are infinite:", "The trouble with computers is", "Never trust a man who", "Love is"]
WRITE: dict[str, Any] = {"max_new_tokens": 32, "greedy": True}
#: Nats. Largest difference of the held-out loss in a new process, which uses other batches; in fp32 and in half precision.
LOSS_TOLERANCE, HALF_LOSS_TOLERANCE = 1e-4, 5e-3

#: Flag -> dotted setting.
FLAGS = {
    "--steps": "train.steps",
    "--warmup": "train.warmup",
    "--bits": "base.bits",
    "--out": "out",
    "--seed": "train.seed",
}


@with_settings(FLAGS, JOB)
def demo(
    settings: dict[str, Any],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier demo in --out")] = False,
) -> None:
    """Run every step on embedded data: SmolLM2-135M-Instruct is trained to write quotations.

    Completes a few prompts, trains for 200 steps on an 8-bit base, and shows the held-out loss before and after. Then loads
    the adapter in a new process, verifies it, and merges it into the full-precision base. Prints commands to try next.

    \b
    examples:
      lorakeet demo
      lorakeet demo --bits 32
      lorakeet demo --steps 30 --warmup 10 --out short-demo
    """
    config = read_run(None, values={**JOB, **settings})
    out = Path(config.out)
    from lorakeet import api
    from lorakeet.train.run import check_run_folder, run_training

    check_run_folder(out, overwrite=overwrite)
    if is_finished(out) and not overwrite:
        raise OutputError(f"{out} already holds a finished run", "repeat it with --overwrite, or choose another --out")
    info("1/5 completing prompts with the base model")
    before = api.generate(api.open_model(config.base), None, OPENINGS, **WRITE)
    info("2/5 training")
    summary = run_training(config, overwrite=overwrite)
    info("3/5 loading the adapter in new processes")
    after = _verify_saved(config, summary, out / "adapter")
    info("4/5 merging")
    whole = config.base.model_copy(update={"bits": None if config.base.bits in QUANTIZED_FORMATS else config.base.bits})
    merged = api.merge(whole, str(out / "adapter"), out / "merged", overwrite=overwrite)
    info("5/5 done")
    print(_report(config, summary, before, after, merged))


def _start(*words: str) -> subprocess.Popen[str]:
    """Start ``lorakeet`` in a new process."""
    command = [sys.executable, "-m", "lorakeet", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _read_output(process: subprocess.Popen[str], name: str) -> list[dict[str, Any]]:
    """Wait for a process and return the JSON objects that it printed, one per line."""
    out, err = process.communicate()
    if process.returncode:
        raise LorakeetError(
            f"`lorakeet {name}` failed in a new process: {err.strip()[-500:]}",
            f"run `lorakeet {name}` on the saved adapter to see all of its messages",
        )
    return [json.loads(line) for line in out.split("\n") if line]


def _verify_saved(config: RunConfig, summary: dict[str, Any], adapter: Path) -> list[str]:
    """Check the held-out loss of the saved adapter and return its completions, in two new processes.

    Raises:
        LorakeetError: The loss differs from that after training.
    """
    base = ["--adapter", str(adapter), *([] if config.base.bits is None else ["--bits", str(config.base.bits)])]
    held_out = ["--eval-fraction", str(config.data.eval_fraction), "--seed", str(config.train.seed)]
    prompts = [word for opening in OPENINGS for word in ("--prompt", opening)]
    tokens = str(WRITE["max_new_tokens"])
    generating = _start("generate", *base, *prompts, "--greedy", "--max-new-tokens", tokens, "--json")
    try:
        measuring = _start("eval", *base, "--data", str(config.data.path), *held_out, "--json")
        loss = _read_output(measuring, "eval")[0]["loss"]
        answers = _read_output(generating, "generate")
    finally:
        generating.kill()
    tolerance = LOSS_TOLERANCE if summary["dtype"] == "float32" else HALF_LOSS_TOLERANCE
    if abs(loss - summary["eval_loss_after"]) > tolerance:
        raise LorakeetError(
            f"the reloaded adapter has a held-out loss of {loss:.6f}, expected {summary['eval_loss_after']:.6f}"
        )
    info(f"held-out loss of the reloaded adapter: {loss:.4f}, as after training")
    return [answer["text"] for answer in answers]


def _report(
    config: RunConfig, summary: dict[str, Any], before: list[str], after: list[str], merged: dict[str, Any]
) -> str:
    def one_line(text: str) -> str:
        return " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())

    lines = []
    for opening, old, new in zip(OPENINGS, before, after, strict=True):
        lines += [opening, f"  before: {one_line(old)}", f"  after:  {one_line(new)}"]
    out = Path(config.out)
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"held-out loss   before {summary['eval_loss_before']:.4f}   after {summary['eval_loss_after']:.4f}",
            f"steps {summary['steps']}, {summary['tokens']} tokens, {summary['tokens_per_second']:.0f} tokens/s",
            f"merged          outputs differ from the adapter's by at most {merged['error']:.1e}",
            "",
            f"adapter         {summary['adapter_path']}",
            f"merged model    {merged['path']}",
            f"loss curve      {out / 'loss_curve.png'}",
            f"summary         {out / 'summary.json'}",
            "",
            "next:",
            f'  lorakeet generate --adapter {summary["adapter_path"]} --prompt "Beware of"',
            "  lorakeet train --data YOUR-TEXT.jsonl --out my-run",
            f"  lorakeet inspect {summary['adapter_path']}",
        ]
    )
