"""The spectrum log of a run: figures of the dense update, one line for each evaluation, and what they mean for r."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny import make, shake
from helpers.tiny_base import furnish
from lorakeet import LoraConfig, get_peft_model
from lorakeet.cli import main
from lorakeet.lora.layer import LoraLayer
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.train.callbacks.spectrum import spectrum_figures, verdict


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}], ids=str)
def test_the_figures_are_those_of_the_dense_update(settings: dict[str, Any]) -> None:
    values = {"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    base = make("llama")
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**values))
    assert spectrum_figures(model, "default").keys() <= {"q_proj", "down_proj"}
    shake(model)
    found = spectrum_figures(model, "default")
    for kind in ("q_proj", "down_proj"):
        needed, effective = [], []
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer) or not name.endswith(kind):
                continue
            dense = layer.delta("default").detach().double()
            if settings.get("init_lora_weights"):
                dense = layer.base_layer.weight.double() + dense - before[f"{name}.weight"].double()
            sigma = torch.linalg.svdvals(dense)[: 8 if "init_lora_weights" in settings else 4]
            shares = sigma.square().cumsum(0) / sigma.square().sum()
            needed.append(int((shares < 0.99).sum()) + 1)
            p = sigma / sigma.sum()
            effective.append(float((-(p * p.log()).sum()).exp()))
        assert [found[kind]["rank_needed"][i] for i in (0, 2)] == [min(needed), max(needed)]
        assert found[kind]["effective_rank"] == pytest.approx(sum(effective) / len(effective), abs=2e-3)


def test_an_adapter_that_changes_nothing_has_no_figures() -> None:
    assert spectrum_figures(get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"])), "default") == {}


@pytest.mark.parametrize(
    ("needed", "expected", "words"),
    [([15, 16, 16], "too low", "--r 32"), ([2, 3, 6], "too high", "--r 6"), ([2, 9, 12], "fits", "rank 2 to 12 of 16")],
)
def test_what_the_figures_mean(needed: list[int], expected: str, words: str) -> None:
    found = verdict({"q_proj": {"r": 16, "effective_rank": 3.0, "rank_needed": needed}})
    assert found[0] == expected and words in found[1]


def test_a_run_logs_a_line_for_each_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", "quotes.jsonl", "--steps", "4", "--r", "4", "--batch-size", "2", "train.eval_every=2"]
    assert main([*words, "--out", "on"]) == 0
    lines = read_metrics("on/metrics.jsonl")
    assert [line["step"] for line in lines if "spectrum" in line] == [2, 4]  # at step 0 the update is zero
    summary = json.loads(Path("on/summary.json").read_text())
    assert summary["spectrum"] == [line["spectrum"] for line in lines if "spectrum" in line][-1]
    assert summary["rank"] in ("too low", "too high", "fits") and Path("on/ranks.png").stat().st_size > 1000
    assert main([*words, "--out", "off", "train.spectrum=false"]) == 0
    off = read_metrics("off/metrics.jsonl")
    figures = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines if "spectrum" not in line]
    assert figures == [(line["step"], line.get("loss"), line.get("eval_loss")) for line in off]
    assert json.loads(Path("off/summary.json").read_text())["rank"] is None and not Path("off/ranks.png").exists()
