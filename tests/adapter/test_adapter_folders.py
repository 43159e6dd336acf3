"""Folders of adapters: one map for saving and loading, and no name leads out of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.tiny import make, shake
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.adapter_folders import adapter_folder, adapter_folders, saved_adapters
from lorakeet.errors import AdapterError

SETTINGS = {"r": 2, "target_modules": ["q_proj"]}
BAD_NAMES = ["", " a", "a.b", "..", "a/b", "/a", "a\\b", "C:", "a\n", "a*", "checkpoint-3", "n" * 300, 7, None]


@pytest.mark.parametrize("name", [*BAD_NAMES, "training", "_modules", "_keys", "weight", "keys", "__base__"])
def test_a_name_that_no_folder_or_table_holds_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be named"):
        adapter_folder(tmp_path, name)  # type: ignore[arg-type]


def test_default_lies_in_the_folder_itself_and_others_below(tmp_path: Path) -> None:
    folders = adapter_folders(tmp_path, ["default", "näme", "a b", "-", "~"])
    assert folders.pop("default") == tmp_path
    assert folders == {name: tmp_path / name for name in folders}


def test_two_names_of_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="would share a folder"):
        adapter_folders(tmp_path, ["Policy", "policy"])


def test_saved_adapters_are_found_where_the_map_puts_them(tmp_path: Path) -> None:
    model = get_peft_model(make("llama"), LoraConfig(**SETTINGS))
    model.add_adapter("checkpoint_a", LoraConfig(**SETTINGS))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "checkpoint-3")
    assert saved_adapters(tmp_path) == adapter_folders(tmp_path, model.peft_config)


def two() -> PeftModel:
    model = get_peft_model(make("llama"), LoraConfig(**SETTINGS), "first")
    model.add_adapter("default", LoraConfig(**SETTINGS))
    model.add_adapter("idle", LoraConfig(**SETTINGS))
    for seed, name in enumerate(model.peft_config):
        shake(model, name, seed)
    model.set_adapter(["first", "default"])
    return model


def test_restoring_puts_each_adapter_back_in_its_own_place(tmp_path: Path) -> None:
    model = two()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    learned = {name for name, parameter in parameters.items() if parameter.requires_grad}
    model.save_pretrained(tmp_path)
    for name in model.peft_config:
        shake(model, name, seed=9)
    assert model.restore_adapters(tmp_path) == ["first", "default", "idle"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.active_adapters == ["first", "default"]
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())  # an optimizer may hold them
    assert {name for name, parameter in now.items() if parameter.requires_grad} == learned


def test_restoring_needs_the_adapters_that_train_or_act(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path, selected_adapters=["default", "idle"])
    with pytest.raises(AdapterError, match="has no adapter 'first', it has 'default', 'idle'"):
        model.restore_adapters(tmp_path)
    model.set_adapter("default")
    assert model.restore_adapters(tmp_path) == ["default", "idle"]
