"""Loading under a name that is taken: settings and weights are one state, replaced whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError

SETTINGS = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
OTHERS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 32},
    "rslora": {"use_rslora": True},
    "alpha pattern": {"alpha_pattern": {"q_proj": 64}},
    "rank": {"r": 2},
    "rank pattern": {"rank_pattern": {"v_proj": 3}},
    "dropout": {"lora_dropout": 0.5},
    "fewer layers": {"target_modules": ["q_proj"]},
    "other layers": {"target_modules": ["down_proj"]},
    "head trained whole": {"modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "biases of B": {"lora_bias": True},
}


def save(folder: Path, seed: int, **more: Any) -> Path:
    model = get_peft_model(make("llama"), LoraConfig(**{**SETTINGS, **more}))
    shake(model, seed=seed)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(token_ids()).logits


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_loaded_adapter_replaces_the_one_of_its_name_whole(change: dict[str, Any], tmp_path: Path) -> None:
    other = save(tmp_path / "b", 5, **change)
    truth = logits(PeftModel.from_pretrained(make("llama"), other))
    model = PeftModel.from_pretrained(make("llama"), save(tmp_path / "a", 3, trainable_token_indices=[2]))
    assert model.load_adapter(other, "default") == ([], [])
    torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (other, tmp_path / "again")]
    assert settings[0] == settings[1]
    assert model.peft_config["default"].lora_dropout == change.get("lora_dropout", 0.0)


def test_the_replaced_parameters_are_those_that_an_optimizer_holds(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(make("llama"), save(tmp_path / "a", 3), is_trainable=True)
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.load_adapter(save(tmp_path / "b", 5, lora_alpha=9, target_modules=["q_proj", "down_proj"]), "default")
    now = dict(model.named_parameters())
    assert {name for name, p in held.items() if now.get(name) is p} == {name for name in held if "q_proj" in name}
    assert all(p.requires_grad for name, p in now.items() if ".lora_" in name)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_that_does_not_fit_changes_nothing(merged: bool, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(make("llama"), save(tmp_path / "a", 3), is_trainable=True)
    bad = save(tmp_path / "b", 5, lora_alpha=8, target_modules=["down_proj"])
    settings = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**settings, "r": 3}))
    if merged:
        model.merge_adapter()
    before, names, want = dict(model.named_parameters()), [*model.peft_config], logits(model)
    with pytest.raises(AdapterError, match="wrong shapes"):
        model.load_adapter(bad, "default")
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is p for name, p in before.items())
    assert [*model.peft_config] == names and model.peft_config["default"].lora_alpha == 4
    assert torch.equal(logits(model), want)


def test_replacing_a_merged_adapter_answers_with_the_new_one(tmp_path: Path) -> None:
    other = save(tmp_path / "b", 5, lora_alpha=9)
    model = PeftModel.from_pretrained(make("llama"), save(tmp_path / "a", 3))
    model.merge_adapter()
    model.load_adapter(other, "default")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(make("llama"), other)))


def test_trained_biases_go_with_their_adapter(tmp_path: Path) -> None:
    model = get_peft_model(make("opt"), LoraConfig(r=2, bias="all"))
    shake(model)
    model.save_pretrained(tmp_path / "biased")
    plain = get_peft_model(make("opt"), LoraConfig(r=2))
    shake(plain)
    plain.save_pretrained(tmp_path / "plain")
    model.load_adapter(tmp_path / "plain", "default")
    assert torch.equal(logits(model), logits(plain))
    model.load_adapter(tmp_path / "biased", "default")
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(make("opt")))


@pytest.mark.parametrize("active", [False, True])
def test_an_adapter_loaded_as_trainable_trains(active: bool, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", 3)
    model = PeftModel.from_pretrained(make("llama"), folder, "frozen")
    name = "frozen" if active else "learner"
    model.load_adapter(folder, name, is_trainable=True)
    assert model.trains(name) and (active or not model.trains("frozen"))
    assert model.active_adapters == ["frozen"]


def test_an_embedding_that_would_change_other_adapters_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", 3, target_modules=["embed_tokens"])
    model = PeftModel.from_pretrained(make("llama", seed=1), save(tmp_path / "b", 4), "b", allow_other_base=True)
    with pytest.raises(AdapterError, match="would change the answers of b"):
        model.load_adapter(folder, "a", allow_other_base=True)
    assert [*model.peft_config] == ["b"]
