"""The same seed twice is the same adapter, whatever the number of threads; and the number itself, where it matters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.task_runs import run_of
from helpers.tiny_training import tiny_llama
from lorakeet.kernels.cpu import features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.patches import thread_order
from lorakeet.patches.thread_order import keep_threads, why_threads_matter
from lorakeet.train.run import run_training


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not features.has(Feature.AVX2), reason="torch multiplies on this processor")
@pytest.mark.parametrize(
    ("kind", "rows", "bits"),
    [
        ("llama", "CAUSAL_LM", 8),
        pytest.param("llama", "CAUSAL_LM", 32, marks=pytest.mark.slow),
        pytest.param("bert", "SEQ_CLS", 32, marks=pytest.mark.slow),
        pytest.param("t5", "SEQ_2_SEQ_LM", 8, marks=pytest.mark.slow),
    ],
)
def test_a_run_has_the_same_bits_with_one_and_two_threads(tmp_path: Path, kind: str, rows: str, bits: int) -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        settings = {"train__steps": 3, "train__log_every": 1, "train__eval_every": 2, "lora__lora_dropout": 0.1}
        config = run_of(tmp_path, kind, rows, base__bits=bits, **settings)
        out = tmp_path / f"run-{threads}"
        run_training(config.model_copy(update={"out": str(out)}))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        figures = [{key: value for key, value in line.items() if "second" not in key} for line in lines]
        found.append(((out / "adapter" / "adapter_model.safetensors").read_bytes(), figures))
    assert found[0] == found[1]


def test_threads_matter_in_half_precision_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    assert (why_threads_matter(model) is None) == features.has(Feature.AVX2)
    assert "half precision" in str(why_threads_matter(model.bfloat16()))
    monkeypatch.setattr(features, "has", lambda _: False)
    assert "AVX2" in str(why_threads_matter(model.float()))


def test_the_threads_of_before_are_kept_where_they_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(thread_order, "info", said.append)
    torch.set_num_threads(1)
    keep_threads(model := tiny_llama(), 2)
    assert torch.get_num_threads() == (1 if features.has(Feature.AVX2) else 2)
    torch.set_num_threads(1)
    keep_threads(model.bfloat16(), 2)
    assert torch.get_num_threads() == 2
    assert said[-1].startswith("threads    2, as before the stop, not 1: torch's products in half precision")
