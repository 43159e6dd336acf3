"""Launch a training in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.tiny_training import WORDS, tiny_llama, tiny_tokenizer
from lorakeet.config import make_run

RUN = """
import sys
from lorakeet.config import read_run
from lorakeet.train.run import run_training
run_training(read_run(sys.argv[1]), **dict.fromkeys(sys.argv[2:], True))
"""


def launch(script: Path, *words: str, processes: int = 2) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def settings(tmp_path: Path, name: str, bits: int | None = None, **train) -> Path:
    base = tmp_path / "base"
    if not base.exists():
        tiny_llama(initializer_range=0.2).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        words = len(WORDS)
        lines = [
            " ".join(WORDS[(i * k) % words] for k in range(1, 3 + i % 9)) + f" {WORDS[i % words]}" for i in range(83)
        ]
        (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = make_run(
        {
            "base": {"model": str(base), "device": "cpu", "dtype": "fp32", "bits": bits},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            "data": {"path": str(tmp_path / "texts.txt"), "eval_fraction": 0.23},
            "train": {"steps": 6, "batch_size": 2, "grad_accum": 2, "lr": 0.05, "eval_every": 3, **train},
            "out": str(tmp_path / name),
        }
    )
    file = tmp_path / f"{name}.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    return file
