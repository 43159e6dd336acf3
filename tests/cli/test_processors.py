"""One job on each path that this machine can take: train, evaluate and merge agree on all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.tiny_tasks import save_tiny, write_rows
from lorakeet.cli import main
from lorakeet.kernels.cpu import features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.int8 import registry

#: Processor -> its features, and the base of the job: products of 8 bits without and with instructions; bf16.
PROCESSORS: dict[str, tuple[set[Feature], list[str]]] = {
    "plain": (set(), ["--bits", "8"]),
    "avx2": ({Feature.AVX2}, ["--bits", "8"]),
    "vnni": ({Feature.AVX2, Feature.AVX512, Feature.VNNI}, ["--bits", "8"]),
    "amx": ({Feature.AVX2, Feature.AVX512, Feature.VNNI, Feature.AMX}, ["--bits", "8"]),
    "bf16": ({Feature.AVX2, Feature.AVX512, Feature.VNNI, Feature.BF16}, ["--dtype", "bf16"]),
}


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say that the processor is another one, as far as its kernels run here."""
    names = PROCESSORS[request.param][0] & features.runnable()
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", ",".join(names))
    for forget in (features.available.cache_clear, registry._chosen.clear):
        forget()
    yield request.param
    monkeypatch.undo()
    for forget in (features.available.cache_clear, registry._chosen.clear):
        forget()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    save_tiny(folder / "base", "llama")
    write_rows(folder / "rows.jsonl", ({"text": f"the bird {'sees the old house ' * (n % 3 + 1)}"} for n in range(24)))
    return folder


def test_a_job_says_the_same(processor: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, rows, run = str(folder / "base"), str(folder / "rows.jsonl"), tmp_path / "run"
    held_out = ["--device", "cpu", "--data", rows, "--eval-fraction", "0.5"]
    common = ["--model", base, *PROCESSORS[processor][1], *held_out]
    words = ["--steps", "2", "--batch-size", "2", "--grad-accum", "1", "--r", "2", "--lr", "0.02"]
    assert main(["train", *common, "--out", str(run), *words]) == 0
    summary = json.loads((run / "summary.json").read_text())
    half = processor == "bf16"
    assert summary["dtype"] == ("bfloat16" if half else "float32")

    capsys.readouterr()
    assert main(["eval", *common, "--adapter", str(run / "adapter"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx(summary["eval_loss_after"], abs=5e-3 if half else 1e-5)

    if half:  # the base is fp32, whatever is computed in
        adapter, out = str(run / "adapter"), tmp_path / "merged"
        assert main(["merge", "--model", base, "--device", "cpu", "--adapter", adapter, "--out", str(out)]) == 0
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
