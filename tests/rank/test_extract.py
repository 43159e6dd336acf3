"""Adapters out of models trained whole: exact at the rank of the change, the best approximation below it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from helpers.bytewise import byte_tokenizer, llama_config
from helpers.tiny import make, shake
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.cli import main
from lorakeet.lora.algebra import approximation
from lorakeet.lora.algebra.approximation import nearest, nearest_for_energy

IDS = torch.tensor([[5, 9, 30, 41, 22, 7]])


def loaded(path: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return saved(tf.LlamaForCausalLM(llama_config()), tmp_path_factory.mktemp("models") / "base")


def merged(base: Path, folder: Path, **settings: Any) -> Path:
    """Save the base merged with an adapter of rank 4."""
    model = get_peft_model(loaded(base), LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    shake(model)
    return saved(model.merge_and_unload(), folder)


def extract(model: Path, base: Path, out: Path, *words: str) -> int:
    return main(["extract", str(model), "--model", str(base), "--out", str(out), *words])


def changes(model: Path, base: Path) -> dict[str, Tensor]:
    before, after = loaded(base).state_dict(), loaded(model).state_dict()
    return {name: after[name] - before[name] for name in before}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    ],
    ids=["kinds", "one layer", "ends"],
)
def test_a_merged_adapter_is_recovered_at_its_rank(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = merged(base, tmp_path / "model", **settings)
    words = ["--embeddings"] if "lm_head" in settings["target_modules"] else []
    assert extract(model, base, tmp_path / "out", "--rank", "4", *words) == 0
    again = PeftModel.from_pretrained(loaded(base), tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, loaded(model)(IDS).logits, rtol=0, atol=2e-5)
    found = inspect_adapter(tmp_path / "out")
    assert {layer["kind"] for layer in found["layers"]} == set(settings["target_modules"]) and not found["problems"]
    assert found["lorakeet"]["base"]["fingerprint"]["architecture"] == "llama"


def test_tied_ends_stay_tied(base: Path, tmp_path: Path) -> None:
    own = saved(tf.LlamaForCausalLM(llama_config(tie_word_embeddings=True)), tmp_path / "tied")
    settings = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model = merged(own, tmp_path / "model", **settings)
    assert extract(model, own, tmp_path / "out", "--rank", "4", "--embeddings") == 0
    again = PeftModel.from_pretrained(loaded(own), tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, loaded(model)(IDS).logits, rtol=0, atol=2e-5)


def test_a_lower_rank_is_the_best_approximation(base: Path, tmp_path: Path) -> None:
    model = merged(base, tmp_path / "model", target_modules=["q_proj", "down_proj"])
    assert extract(model, base, tmp_path / "out", "--rank", "2") == 0
    best = PeftModel.from_pretrained(loaded(base), tmp_path / "out").merge_and_unload().state_dict()
    before = loaded(base).state_dict()
    for name, change in changes(model, base).items():
        if "q_proj" in name or "down_proj" in name:
            found = best[name] - before[name]
            missing = torch.linalg.svdvals(change.double())[2:].norm()  # Eckart and Young 1936
            assert float((change - found).norm()) == pytest.approx(float(missing), rel=1e-4)


def test_energy_chooses_the_rank_of_each_layer(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = merged(base, tmp_path / "model", target_modules=["q_proj", "up_proj"])
    assert extract(model, base, tmp_path / "out", "--energy", "0.9", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["energy_kept"] >= 0.9 and len(figures["ranks"]) == 4
    for name, r in figures["ranks"].items():
        squares = torch.linalg.svdvals(changes(model, base)[f"{name}.weight"].double()).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[r - 1] >= 0.9 and (r == 1 or shares[r - 2] < 0.9)


def test_norms_are_saved_whole_and_the_rest_is_told(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(merged(base, tmp_path / "merged", target_modules=["q_proj"]))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight += 0.3
        model.model.norm.weight += 0.1
    saved(model, tmp_path / "model")
    with caplog.at_level("INFO", "lorakeet"):
        assert extract(tmp_path / "model", base, tmp_path / "out", "--rank", "4") == 0
    assert "saved whole, since they are no matrices" in caplog.text and "not in the adapter" not in caplog.text
    again = PeftModel.from_pretrained(loaded(base), tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)
    with torch.no_grad():
        model.lm_head.weight += 0.1
    saved(model, tmp_path / "model")
    assert extract(tmp_path / "model", base, tmp_path / "out", "--rank", "4", "--overwrite") == 0
    assert "changed, but not in the adapter: lm_head.weight; --embeddings adds" in caplog.text


def test_models_that_do_not_belong_together(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, wide = (
        saved(make("gpt2"), tmp_path / "gpt2"),
        saved(tf.LlamaForCausalLM(llama_config(intermediate_size=56)), tmp_path / "wide"),
    )
    for model, words in (
        (other, "is a gpt2 model"),
        (wide, "[32, 56], expected [32, 48]"),
        (base, "no layer of the two"),
    ):
        assert extract(model, base, tmp_path / "out", "--rank", "4") == 2
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(90, 70), (70, 90)])
def test_a_large_matrix_is_decomposed_by_random_vectors(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(approximation, "EXACT", 8)
    values = 0.8 ** torch.arange(60, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(size, 60, dtype=torch.float64)).Q for size in shape)
    matrix = u @ torch.diag(values) @ v.T
    found = nearest(matrix, 5)
    assert len(found.values) == 2 * 5 + 16  # the exact one has 70
    torch.testing.assert_close(found.values[:5], values[:5], rtol=1e-9, atol=0)
    a, b = found.truncated(5)
    assert float((matrix - b @ a).norm()) == pytest.approx(float(values[5:].norm()), rel=1e-9)
    _, rank = nearest_for_energy(matrix, 0.99)
    shares = values.square().cumsum(0) / values.square().sum()
    assert rank == int((shares < 0.99).sum()) + 1
    assert nearest_for_energy(matrix, 1.0)[1] >= 55 and nearest_for_energy(torch.zeros(shape), 0.99)[1] == 1
