"""Arguments of a short training, and one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from helpers.tiny_training import PAD, WORDS, tiny_llama, tiny_tokenizer
from lorakeet.config import RunConfig, make_run
from lorakeet.data.collate import PaddingCollator


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: matrices of width 32 do not profit from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_args(tmp_path: Path) -> Callable[..., TrainingArguments]:
    def make(**changes: Any) -> TrainingArguments:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 4,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": True,
            "seed": 3,
            **changes,
        }
        return TrainingArguments(**values)

    return make


@pytest.fixture
def collator() -> PaddingCollator:
    return PaddingCollator(PAD)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_llama(initializer_range=0.2).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base_folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    data = tmp_path / "texts.txt"
    words = len(WORDS)
    lines = [" ".join(WORDS[(i * k) % words] for k in range(1, 3 + i % 9)) + f" {WORDS[i % words]}" for i in range(60)]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def make(**changes: Any) -> RunConfig:
        tree: dict[str, Any] = {
            "base": {"model": str(base_folder), "device": "cpu", "dtype": "fp32"},
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
            "data": {"path": str(data), "eval_fraction": 0.2},
            "train": {"steps": 6, "batch_size": 4, "grad_accum": 2, "lr": 0.05, "warmup": 1},
            "out": str(tmp_path / "run"),
        }
        for name, value in changes.items():
            section, _, key = name.partition("__")
            if key:
                tree[section][key] = value
            else:
                tree[section] = value
        return make_run(tree)

    return make
