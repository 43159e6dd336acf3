"""One job on each path that this machine can take: train, evaluate and merge agree, whatever the processor is said to be."""

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

#: Features that a processor is said to have: none; those of the first with AVX2; those with 8-bit products; those with tiles.
PROCESSORS: dict[str, set[Feature]] = {
    "plain": set(),
    "avx2": {Feature.AVX2},
    "vnni": {Feature.AVX2, Feature.AVX512, Feature.VNNI},
    "amx": {Feature.AVX2, Feature.AVX512, Feature.VNNI, Feature.BF16, Feature.AMX},
}


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say that the processor is another one, as far as its kernels run here."""
    names = PROCESSORS[request.param] & features.runnable()
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


@pytest.mark.parametrize("bits", [None, 8])
def test_a_job_says_the_same(processor: str, bits: int | None, folder: Path, tmp_path: Path, capsys: Any) -> None:
    base, rows, run = str(folder / "base"), str(folder / "rows.jsonl"), tmp_path / "run"
    quantized = [] if bits is None else ["--bits", str(bits)]
    common = ["--model", base, "--device", "cpu", *quantized]
    words = ["--steps", "3", "--batch-size", "2", "--grad-accum", "1", "--r", "2", "--eval-fraction", "0.5"]
    assert main(["train", *common, "--data", rows, "--out", str(run), *words]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dtype"] == ("bf16" if processor == "amx" and bits is None else "fp32")

    capsys.readouterr()
    assert main(["eval", *common, "--adapter", str(run / "adapter"), "--data", rows, "--eval-fraction", "0.5"]) == 0
    out = capsys.readouterr().out
    assert f"{summary['eval_loss']:.3f}" in out, out

    assert main(["merge", "--model", base, "--adapter", str(run / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32  # the base's own, on every processor
