"""``lorakeet demo``"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.options import with_settings
from lorakeet.config import RunConfig, read_run
from lorakeet.errors import LorakeetError
from lorakeet.log import info

#: The article's job: r=16 on query and value projections, 200 steps of 4 × 4 quotations; the base in 8 bits.
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
OPENINGS = ["Two things are infinite:", "The trouble with computers is", "Never trust a man who", "Love is"]
WRITE: dict[str, Any] = {"max_new_tokens": 32, "greedy": True}
#: How far the loss measured in a new process may be off: the same rows, other batches. In half precision each rounds anew.
SAME, SAME_IN_HALF = 1e-4, 5e-3


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
    """The whole job on embedded data: SmolLM2-135M-Instruct learns to write quotations.

    Completes a few openings, trains (200 steps, 100 of them warm-up, unless told otherwise; the base is in 8 bits), shows
    the held-out loss before and after, loads the adapter again in a new process, verifies it, merges it into the base as it
    was before rounding, and says what to type next.

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
    info("1/5 what the base model writes")
    before = api.generate(api.open_model(config.base), None, OPENINGS, **WRITE)
    info("2/5 training")
    summary = run_training(config, overwrite=overwrite)
    info("3/5 the adapter, loaded again in new processes")
    after = _loaded_again(config, summary, out / "adapter")
    info("4/5 merging")
    whole = config.base.model_copy(update={"bits": None if config.base.bits == 8 else config.base.bits})
    merged = api.merge(whole, str(out / "adapter"), out / "merged", overwrite=overwrite)
    info("5/5 done")
    print(_report(config, summary, before, after, merged))


def _anew(*words: str) -> subprocess.Popen[str]:
    """``lorakeet`` in a new process, which runs beside this one."""
    command = [sys.executable, "-m", "lorakeet", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _printed(process: subprocess.Popen[str], name: str) -> list[dict[str, Any]]:
    """The JSON objects that a process prints, one a line, when it has ended."""
    out, err = process.communicate()
    if process.returncode:
        raise LorakeetError(f"`lorakeet {name}` failed in a new process: {err.strip()[-500:]}")
    return [json.loads(line) for line in out.splitlines()]


def _loaded_again(config: RunConfig, summary: dict[str, Any], adapter: Path) -> list[str]:
    """What the saved adapter writes, and that its held-out loss is that of the trained one: two new processes.

    Raises:
        LorakeetError: it is not.
    """
    base = ["--adapter", str(adapter), *([] if config.base.bits is None else ["--bits", str(config.base.bits)])]
    held_out = ["--eval-fraction", str(config.data.eval_fraction), "--seed", str(config.train.seed)]
    prompts = [word for opening in OPENINGS for word in ("--prompt", opening)]
    writing = _anew("generate", *base, *prompts, "--greedy", "--max-new-tokens", str(WRITE["max_new_tokens"]), "--json")
    try:
        measuring = _anew("eval", *base, "--data", str(config.data.path), *held_out, "--json")
        again = _printed(measuring, "eval")[0]["loss"]
        written = _printed(writing, "generate")
    finally:
        writing.kill()
    near = SAME if summary["dtype"] == "float32" else SAME_IN_HALF
    if abs(again - summary["eval_loss_after"]) > near:
        raise LorakeetError(
            f"the adapter loaded again has a held-out loss of {again:.6f}, expected {summary['eval_loss_after']:.6f}"
        )
    info(f"held-out loss of the adapter loaded again: {again:.4f}, as after training")
    return [line["text"] for line in written]


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
