"""Tokens a second of training and writing, for each number format, each in a process of its own.

python -m lorakeet.cli.bench.runs '{"base": {"bits": 8}, ...}' STEPS TOKENS
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorakeet._optional_imports import hide_optional_packages
from lorakeet.cli.demo import JOB
from lorakeet.config import BaseSettings, RunConfig, read_run
from lorakeet.errors import LorakeetError, TrainingError
from lorakeet.kernels.cpu import features
from lorakeet.log import info, warn

#: Number format -> settings of the base.
FORMATS: dict[str, dict[str, Any]] = {
    "auto": {},
    "fp32": {"bits": 32},
    "bf16": {"bits": 16, "dtype": "bf16"},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
}
#: Optimizer steps, of 16 samples each, and tokens that are written; with --short.
STEPS, TOKENS = (4, 2), (64, 24)
OPENING = "Two things are infinite:"
#: Training by PEFT as its users write it: samples of token ids on stdin, tokens/s on stdout. The first step does not count.
PEFT = """
import json, sys, time, torch, peft, transformers
told = json.load(sys.stdin)
model = transformers.AutoModelForCausalLM.from_pretrained(told["model"], dtype=getattr(torch, told["dtype"]))
config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = peft.get_peft_model(model, config).train()
learns = [p for p in model.parameters() if p.requires_grad]
optimizer, marks, tokens = torch.optim.AdamW(learns, lr=2e-4), [], []
for step in told["steps"]:
    for rows in step:
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = ids.masked_fill(mask == 0, -100)
        (model(input_ids=ids, attention_mask=mask, labels=labels).loss / len(step)).backward()
    torch.nn.utils.clip_grad_norm_(learns, 1.0)
    optimizer.step(), optimizer.zero_grad()
    marks.append(time.perf_counter()), tokens.append(sum(len(row) for rows in step for row in rows))
print(json.dumps(sum(tokens[1:]) / (marks[-1] - marks[0])))
"""


def measure_formats(config: RunConfig, short: bool) -> list[dict[str, Any]]:
    """Measure training and writing in every number format of this machine.

    Returns:
        For each: ``format``, ``train`` and ``write`` in tokens/s, with ``write`` None for PEFT; and ``dtype``, if chosen.
        Where ``auto`` keeps weights in 16 bits, ``stored_bits`` is 16.
    """
    rows, halves = [], _keeps_halves(config.base.model)
    for name, base in FORMATS.items():
        if (name == "bf16" and not features.has_bf16()) or (short and name == "auto" and not halves):
            continue
        info(f"  {name}")
        given = {"base": {"model": config.base.model, **base}, "data": {"path": config.data.path}}
        words = [json.dumps(given), str(STEPS[short]), str(TOKENS[short])]
        found = _answer([sys.executable, "-m", "lorakeet.cli.bench.runs", *words], name)
        stored = {"stored_bits": 16} if name == "auto" and halves else {}
        rows += [] if found is None else [{"format": name, **found, **stored}]
    return [*rows, *_peft(config, short)]


def _keeps_halves(model: str) -> bool:
    """Whether ``auto`` keeps the weights of a model in the 16 bits of its files."""
    from lorakeet.base.device_dtype import choose_device, keeps_halves
    from lorakeet.base.source import find_source, local_folder

    return keeps_halves(BaseSettings(model=model), choose_device("auto"), local_folder(find_source(model)))


def _answer(words: list[str], name: str, told: str = "") -> Any:
    """Run a process and read the JSON in its last line; warn and return None if it fails."""
    done = subprocess.run(words, input=told, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        said = [line for line in lines if line.startswith("error:")] or lines[-1:] or ["no message"]
        warn(f"{name} could not be measured: {said[0].removeprefix('error: ')}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def _peft(config: RunConfig, short: bool) -> list[dict[str, Any]]:
    """Return the rows of PEFT, in fp32 and where torch has fast products of it in bf16; none if it is not installed."""
    try:
        version("peft")
    except PackageNotFoundError:
        return []
    from lorakeet.base.load import inspect_model
    from lorakeet.base.source import find_source, local_folder
    from lorakeet.data import prepare
    from lorakeet.tasks.setup import task_settings

    job = read_run(None, values={**JOB, "base.model": config.base.model, "data.path": config.data.path})
    found = inspect_model(job.base)
    prepared = prepare(job.data, task_settings(job, found), found.tokenizer, seed=job.train.seed)
    ids = [sample["input_ids"] for sample in prepared.train]
    steps = [[ids[at : at + 4] for at in range(step * 16, step * 16 + 16, 4)] for step in range(STEPS[short] + 1)]
    told = {"model": str(local_folder(find_source(config.base.model))), "steps": steps}
    rows = []
    for dtype in ("float32", "bfloat16") if features.has_bf16() else ("float32",):
        info(f"  PEFT {dtype}")
        rate = _answer([sys.executable, "-c", PEFT], "PEFT", json.dumps({**told, "dtype": dtype}))
        if rate is not None:
            rows.append({"format": f"PEFT {'fp32' if dtype == 'float32' else 'bf16'}", "train": rate, "write": None})
    return rows


def measure_one(given: dict[str, Any], steps: int, tokens: int) -> dict[str, Any]:
    """Train a few steps of the demo's job, and write a text; in this process."""
    from lorakeet.train.run import run_training

    values = {**JOB, "train.steps": steps + 1, "train.warmup": 1, "data.eval_fraction": 0, "train.eval_every": None}
    values |= {f"{section}.{key}": value for section, part in given.items() for key, value in part.items()}
    with tempfile.TemporaryDirectory() as folder:
        config = read_run(None, values={**values, "out": str(Path(folder, "run"))})
        with suppress(TrainingError):  # a few steps may end with a higher loss; only the time counts here
            run_training(config)
        summary = json.loads(Path(config.out, "summary.json").read_text(encoding="utf-8"))
    train = summary["tokens"] / summary["steps"] / summary["step_seconds"]
    return {"dtype": summary["dtype"], "train": train, "write": writing_rate(config.base, tokens)}


def writing_rate(base: BaseSettings, tokens: int) -> float:
    """Measure the tokens/s of a text of this length, without the time to read its opening."""
    import torch

    from lorakeet.base.load import load_base
    from lorakeet.eval_mode import evaluating
    from lorakeet.inference.fast_decode import fast_decode

    loaded, seconds = load_base(base), []
    ids = torch.tensor([loaded.tokenizer(OPENING)["input_ids"]], device=loaded.device)
    with evaluating(loaded.model), fast_decode(loaded.model), torch.inference_mode():
        for length in (2, 2, 2 + tokens):  # the first call does not count
            began = time.perf_counter()
            loaded.model.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False)
            seconds.append(time.perf_counter() - began)
    return tokens / max(seconds[2] - seconds[1], 1e-9)


if __name__ == "__main__":
    hide_optional_packages()
    try:
        print(json.dumps(measure_one(json.loads(sys.argv[1]), *map(int, sys.argv[2:]))))
    except LorakeetError as error:
        sys.exit(f"error: {error}")
