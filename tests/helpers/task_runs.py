"""Configuration of a short run for any task."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny_tasks import rows_for, save_tiny, write_rows
from lorakeet.config import RunConfig, make_run


def run_of(tmp_path: Path, kind: str, rows: str, **changes: object) -> RunConfig:
    base = save_tiny(tmp_path / kind, kind)
    data = write_rows(tmp_path / f"{rows}.jsonl", rows_for(rows))
    tree = {
        "base": {"model": str(base), "device": "cpu", "dtype": "fp32"},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"path": str(data), "eval_fraction": 0.2},
        "train": {"steps": 90, "batch_size": 16, "grad_accum": 1, "lr": 0.01, "warmup": 3},
        "out": str(tmp_path / "run"),
    }
    for name, value in changes.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    return make_run(tree)
