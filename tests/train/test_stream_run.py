"""Data that does not fit into memory: a training on a stream, whose memory stays flat."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.tiny_tasks import FILLERS, save_tiny
from lorakeet.config import make_run
from lorakeet.errors import DataError
from lorakeet.train.run import run_training

SCRIPT = """
import json, sys
from transformers import TrainerCallback
from lorakeet.config import make_run
from lorakeet.train import run as module
from lorakeet.runs.process_memory import peak_rss_bytes

seen = {}

class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step in (early, state.max_steps):
            seen[state.global_step] = peak_rss_bytes()

tree, early = json.loads(sys.argv[1]), int(sys.argv[2])
made = module.Run._trainer
module.Run._trainer = lambda self, callbacks, rest: made(self, [*callbacks, Watch()], rest)
summary = module.run_training(make_run(tree))
print(json.dumps({"grown": max(seen.values()) - seen[early], "samples": summary["samples"], "loss": summary["after"]}))
"""


def settings(folder: Path, data: Path, **train: int) -> dict:
    return {
        "base": {"model": str(folder / "base"), "device": "cpu", "dtype": "fp32"},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"path": str(data), "stream": True, "shuffle_buffer": 500, "max_length": 16, "eval_fraction": 0.01},
        "train": {"batch_size": 64, "grad_accum": 1, "lr": 0.001, "log_every": 50, **train},
        "out": str(folder / "run"),
    }


def write(path: Path, rows: int, words: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            first = random.Random(number).choices(FILLERS, k=20)  # longer than a sample: no two are cut to the same
            text = " ".join([*first, *FILLERS * (words // len(FILLERS))][:words])
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    return path


def test_a_training_on_a_stream(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama")
    data = write(tmp_path / "rows.jsonl", 2000, 8)
    summary = run_training(make_run(settings(tmp_path, data, steps=12)))
    assert summary["steps"] == 12 and summary["samples"] == 12 * 64
    assert summary["after"]["loss"] < summary["before"]["loss"] and summary["eval_tokens"] > 0


def test_rows_that_are_all_cut_to_what_is_held_out_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(FILLERS * 2 + FILLERS[:n])}) + "\n" for n in range(1, 9)))
    with pytest.raises(DataError, match="equals a held-out one"):
        run_training(make_run(settings(tmp_path, data, steps=2)))


@pytest.mark.slow
def test_memory_stays_flat_on_ten_times_more_data(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama")
    data = write(tmp_path / "rows.jsonl", 120_000, 300)
    size, steps = data.stat().st_size, 1800
    words = json.dumps(settings(tmp_path, data, steps=steps))
    done = subprocess.run([sys.executable, "-c", SCRIPT, words, "200"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["samples"] == steps * 64 > 0.95 * 120_000 * 0.99
    assert told["grown"] < size / 10, f"{told['grown'] / 1e6:.1f} MB more for {size / 1e6:.1f} MB of data"
