"""Two adapters compared: figures against dense matrices, and losses and divergences against whole logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.tiny import make, shake
from helpers.tiny_base import finish_a_run, furnish
from helpers.tiny_experts import adapted
from lorakeet import LoraConfig, get_peft_model
from lorakeet.api import combine_adapters, compare_adapters, evaluate_data, open_model
from lorakeet.cli import main
from lorakeet.config import BaseSettings, DataSettings
from lorakeet.errors import AdapterError
from lorakeet.workshop.on_data import bootstrap_interval, wilson_interval
from lorakeet.workshop.similarity import principal_angles, similarity_report

pytestmark = pytest.mark.filterwarnings("ignore")


def save(folder: Path, seed: int, base: int = 0, **settings: Any) -> dict[str, Tensor]:
    """Save an adapter with random weights; return its ΔW."""
    model = get_peft_model(
        make("llama", base), LoraConfig(**{"target_modules": ["q_proj", "embed_tokens"], **settings})
    )
    shake(model, seed=seed)
    model.save_pretrained(folder)
    names = {name: layer for name, layer in model.named_modules() if "default" in getattr(layer, "r", {})}
    return {name: layer.delta("default").detach().double() for name, layer in names.items()}


def test_figures_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    one = save(tmp_path / "a", 1, r=3, lora_alpha=5)
    other = save(tmp_path / "b", 2, r=5, use_rslora=True, target_modules=["q_proj", "embed_tokens", "v_proj"])
    report = similarity_report(tmp_path / "a", tmp_path / "b")
    for layer in report["layers"]:
        a, b = one[layer["name"]], other[layer["name"]]
        if layer["kind"] == "embed_tokens":
            a, b = a.T, b.T
        (U1, _, V1), (U2, _, V2) = (torch.linalg.svd(x, full_matrices=False) for x in (a, b))
        U1, V1, U2, V2 = U1[:, :3], V1[:3].T, U2[:, :5], V2[:5].T
        assert layer["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
        overlaps = [float((x.T @ y).square().sum()) / 3 for x, y in ((U1, U2), (V1, V2))]
        assert [layer["column_overlap"], layer["row_overlap"]] == pytest.approx(overlaps, abs=1e-5)
        shared = float((U2 @ U2.T @ a @ V2 @ V2.T).norm() ** 2 / a.norm() ** 2)
        assert layer["shared_energy"][0] == pytest.approx(shared, abs=1e-5)
        assert layer["sign_conflicts"] == pytest.approx(float((a * b < 0).double().mean()), abs=1e-3)
        cancelled = 1 - float((a + b).abs().sum() / (a.abs().sum() + b.abs().sum()))
        assert layer["cancelled"] == pytest.approx(cancelled, abs=1e-5)
        assert layer["chance"] == pytest.approx([5 / len(a), 5 / a.shape[1]])
    common = [name for name in one if name in other]
    inner = sum(float((one[name] * other[name]).sum()) for name in common)
    norms = [math.sqrt(sum(float(x.square().sum()) for x in each.values())) for each in (one, other)]
    assert report["norms"] == pytest.approx(norms, rel=1e-5) and len(report["only_in"][1]) == 3
    assert report["cosine"] == pytest.approx(inner / norms[0] / norms[1], abs=1e-6)
    assert report["difference_norm"] == pytest.approx(math.sqrt(norms[0] ** 2 + norms[1] ** 2 - 2 * inner), rel=1e-5)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_same_update_and_its_opposite(tmp_path: Path) -> None:
    save(tmp_path / "a", 1, r=3)
    combine_adapters([tmp_path / "a"], tmp_path / "minus", [-2.0])
    report = similarity_report(tmp_path / "a", tmp_path / "minus")
    for kind in report["kinds"]:
        assert kind["cosine"] == pytest.approx(-1) and kind["sign_conflicts"] == pytest.approx(1, abs=1e-3)
        assert kind["column_overlap"] == pytest.approx(1) and kind["shared_energy"] == pytest.approx(1)
        assert kind["cancelled"] == pytest.approx(2 / 3, abs=1e-3)
    assert max(angle for layer in report["layers"] for angle in layer["row_angles"]) < 1e-2


def test_principal_angles_of_planes() -> None:
    tilted = torch.tensor([[1.0, 0], [0, math.cos(0.3)], [0, math.sin(0.3)]])
    assert principal_angles(torch.eye(3)[:, :2], tilted) == pytest.approx([0, math.degrees(0.3)], abs=1e-3)


def test_an_update_of_zero_has_no_angle(tmp_path: Path) -> None:
    save(tmp_path / "a", 1, r=3)
    combine_adapters([tmp_path / "a"], tmp_path / "zero", [0.0])
    report = similarity_report(tmp_path / "a", tmp_path / "zero")
    assert report["cosine"] is None and {layer["cosine"] for layer in report["layers"]} == {None}


def test_stacked_experts(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        model = adapted()
        shake(model, seed=seed)
        model.save_pretrained(tmp_path / name)
    report = similarity_report(tmp_path / "a", tmp_path / "b")
    assert {layer["kind"] for layer in report["layers"]} >= {"q_proj"} and abs(report["cosine"]) < 0.3


def test_adapters_of_different_bases(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 1, base=4)
    with pytest.raises(AdapterError, match="different bases"):
        similarity_report(tmp_path / "a", tmp_path / "b")
    assert similarity_report(tmp_path / "a", tmp_path / "b", allow_other_base=True)["cosine"] == pytest.approx(1)


def test_intervals() -> None:
    assert wilson_interval(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert wilson_interval(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-4)
    random = np.random.default_rng(1)
    low, high = bootstrap_interval(random.normal(0.5, 1, 400), np.ones(400))
    assert low < 0.5 < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = furnish(tmp_path_factory.mktemp("compared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKEET_HOME", str(tmp_path_factory.mktemp("home")))
        patch.chdir(folder)
        finish_a_run()
        combine_adapters(["my-run/adapter"], Path("double"), [2.0])
    return folder


def test_losses_and_divergences(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names = ["my-run/adapter", "double"]
    found = compare_adapters(*names, data=DataSettings(path="quotes.jsonl"))["data"]
    opened = open_model(BaseSettings(), names)
    for key, name in (("base", None), *((name, name) for name in names)):
        figures = evaluate_data(opened, name, DataSettings(path="quotes.jsonl"))
        assert found["loss"][key] == pytest.approx(figures["loss"], abs=2e-5) and found["tokens"] == figures["tokens"]
    low, high = found["loss_difference"]["interval"]
    assert low <= found["loss_difference"]["mean"] <= high and found["rows"] == 40
    assert all(win["interval"][0] <= win["rate"] <= win["interval"][1] for win in found["wins"])
    row = compare_adapters(*names, data=DataSettings(path="quotes.jsonl", limit=1))["data"]
    ids = opened.base.tokenizer(json.loads((place / "quotes.jsonl").open().readline())["quote"], return_tensors="pt")
    scores = []
    for name in (None, *names):
        with torch.no_grad(), opened.answering(name):
            scores.append(F.log_softmax(opened.model(ids["input_ids"]).logits[0].double(), -1))
    kl = [float((scores[i].exp() * (scores[i] - scores[0])).sum(-1).mean()) for i in (1, 2)]
    assert list(row["kl_to_base"].values()) == pytest.approx(kl, rel=1e-3)


def test_command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    words = [
        "compare",
        "my-run/adapter",
        "double",
        "--data",
        "quotes.jsonl",
        "--eval-fraction",
        "0.2",
        "--prompt",
        "Beware",
    ]
    assert main([*words, "--picture", "similarity.png", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "q_proj" in out and "double has a lower loss than my-run/adapter" in out and "[base] " in out
    assert (place / "similarity.png").stat().st_size > 10_000
    assert main(["compare", "my-run/adapter", "double", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cosine"] == pytest.approx(1)
    assert main(["compare", "my-run/adapter", "double", "--eval-fraction", "0.2"]) == 2
    assert "there is no --data" in capsys.readouterr().err
    assert main(["compare", "my-run/adapter", "my-run/adapter"]) == 2
    assert "given twice" in capsys.readouterr().err
