"""Tensors of the base that train beside an adapter are saved with it, restored, and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.adapter.unfrozen import unfrozen_names
from lorakeet.errors import AdapterError

SETTINGS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(token_ids()).logits


def trained(*names: str, adapter: str = "default") -> PeftModel:
    model = get_peft_model(make("llama"), LoraConfig(**SETTINGS), adapter)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    shake(model, adapter)
    return model


@pytest.mark.parametrize(
    "names",
    [
        ["model.norm.weight"],
        ["model.embed_tokens.weight"],  # tied to the head
        ["model.layers.0.self_attn.q_proj.base_layer.weight", "model.layers.2.mlp.up_proj.weight"],
    ],
)
@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_saved_and_loaded_with_the_adapter(names: list[str], adapter: str, tmp_path: Path) -> None:
    model = trained(*names, adapter=adapter)
    model.requires_grad_(False)  # frozen before it is saved: what trained is remembered
    assert unfrozen_names(trained(*names, adapter=adapter)) == names
    assert unfrozen_names(model) == []  # but a model that never listed them cannot know
    model = trained(*names, adapter=adapter)
    unfrozen_names(model)
    model.requires_grad_(False)
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    again = PeftModel.from_pretrained(make("llama"), folder)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(PeftModel.from_pretrained(make("llama"), tmp_path / "second")), logits(model))
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(make("llama"), str(folder))), logits(model), atol=1e-5)


def test_the_notes_list_the_names(tmp_path: Path) -> None:
    trained("model.norm.weight").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "lorakeet.json").read_text())["unfrozen"] == ["model.norm.weight"]
    assert "unfrozen" not in json.loads(_saved(trained(), tmp_path / "plain").read_text())
    inspect_adapter(tmp_path)


def _saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder / "lorakeet.json"


def test_a_tensor_that_the_notes_do_not_list_is_refused(tmp_path: Path) -> None:
    notes = _saved(trained("model.norm.weight"), tmp_path)
    notes.write_text(json.dumps({**json.loads(notes.read_text()), "unfrozen": []}))
    with pytest.raises(AdapterError, match="unexpected tensors"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def test_running_means_of_a_batch_norm_are_saved(tmp_path: Path) -> None:
    model = get_peft_model(Normed(), LoraConfig(r=2, target_modules=["first"]))
    shake(model)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    model.train()(x)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Normed(), tmp_path)
    assert torch.equal(again(x), model.eval()(x))
    frozen = get_peft_model(Normed().eval(), LoraConfig(r=2, target_modules=["first"]))
    assert unfrozen_names(frozen.eval()) == []
