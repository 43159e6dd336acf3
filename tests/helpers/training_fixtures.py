"""Arguments of a short training, and one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from helpers.tiny_training import PAD
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
