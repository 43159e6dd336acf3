"""The artefact, both ways: what Lorakeet saves loads in ``peft`` with the same answers, and the reverse.

A table of architectures × options. Where ``peft`` saves or computes something, that is the outside truth.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open

from lorakeet import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny import EMBEDDING, LINEARS, TASK, make, shake, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {
    "plain": {},
    "defaults": {"target_modules": None},
    "rank and alpha": {"r": 3, "lora_alpha": 7},
    "dropout": {"lora_dropout": 0.3},
    "regex": {"target_modules": "{regex}"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": ["{first}"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "head trained whole": {"modules_to_save": ["{head}"]},
    "two of the layers": {"layers_to_transform": [0, 2]},
    "layers pattern": {"layers_to_transform": [1], "layers_pattern": "{layers}"},
    "rank pattern": {"rank_pattern": {"{first}": 2}, "alpha_pattern": {"{second}": 9}},
    "pattern of one layer": {"rank_pattern": {"{layers}.1.*{first}": 5}},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 6},
    "gaussian": {"init_lora_weights": "gaussian"},
    "embedding": {"target_modules": ["{embedding}", "{first}"]},
    "lora_bias": {"lora_bias": True},
}
LAYERS = {"llama": "layers", "opt": "layers", "gpt2": "h", "bloom": "h", "bert": "layer"}
HEAD = {"llama": "lm_head", "opt": "lm_head", "gpt2": "lm_head", "bloom": "lm_head", "bert": "classifier"}


def settings(architecture: str, option: str) -> dict:
    first, second, third = LINEARS[architecture]
    names = {
        "{first}": first,
        "{second}": second,
        "{regex}": rf".*\.({first}|{second.replace('.', chr(92) + '.')})",
        "{head}": HEAD[architecture],
        "{layers}": LAYERS[architecture],
        "{embedding}": EMBEDDING[architecture],
    }

    def fill(value):
        if isinstance(value, str):
            for key, name in names.items():
                value = value.replace(key, name)
            return value
        if isinstance(value, list):
            return [fill(item) for item in value]
        return {fill(k): v for k, v in value.items()} if isinstance(value, dict) else value

    chosen = {"target_modules": [first, second, third], "r": 4, "task_type": TASK[architecture]}
    chosen |= {key: fill(value) for key, value in OPTIONS[option].items()}
    if architecture == "gpt2":
        chosen["fan_in_fan_out"] = True
    return chosen


def keys(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def comparable(folder: Path) -> dict:
    """The saved config with sets as sets, and all-linear's two spellings (names, minimal names) left to the keys."""
    values = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values[key], list):
            values[key] = sorted(set(values[key]))  # PEFT repeats a head that is both the task's and named
    return values


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("architecture", LINEARS)
def test_both_ways(architecture: str, option: str, tmp_path: Path) -> None:
    chosen = settings(architecture, option)
    ids = token_ids()

    theirs = peft.get_peft_model(make(architecture), peft.LoraConfig(**chosen))
    shake(theirs)
    theirs.eval()
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs(ids).logits

    loaded = PeftModel.from_pretrained(make(architecture), tmp_path / "theirs")
    torch.testing.assert_close(loaded(ids).logits, wanted, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(make(architecture), tmp_path / "again")
    torch.testing.assert_close(again(ids).logits, wanted, rtol=0, atol=1e-5)

    ours = get_peft_model(make(architecture), LoraConfig(**chosen))
    shake(ours)
    ours.eval()
    ours.save_pretrained(tmp_path / "ours")
    answer = ours(ids).logits
    assert (answer - make(architecture)(ids).logits).abs().max() > 1e-3, "the adapter does nothing"
    back = peft.PeftModel.from_pretrained(make(architecture), tmp_path / "ours")
    torch.testing.assert_close(back(ids).logits, answer, rtol=0, atol=1e-5)

    mine = PeftModel.from_pretrained(make(architecture), tmp_path / "ours")
    assert torch.equal(mine(ids).logits, answer)

    redundant = (".original_module.bias", ".modules_to_save.bias")
    theirs_keys = {k: v for k, v in keys(tmp_path / "theirs").items() if not k.endswith(redundant)}
    assert keys(tmp_path / "ours") == theirs_keys == keys(tmp_path / "again")
    mine, true = comparable(tmp_path / "ours"), comparable(tmp_path / "theirs")
    if option == "all-linear":
        mine.pop("target_modules"), true.pop("target_modules")
    assert mine == true
    assert comparable(tmp_path / "again") | {"target_modules": 0} == true | {"target_modules": 0}
    assert PeftConfig.from_pretrained(tmp_path / "ours").to_dict() == ours.peft_config["default"].to_dict() | {
        "inference_mode": True
    }


@pytest.mark.parametrize("architecture", LINEARS)
def test_same_gradients_as_peft_and_as_a_dense_update(architecture: str) -> None:
    chosen = settings(architecture, "plain")
    labels = torch.tensor([0, 3]) if architecture == "bert" else token_ids()
    grads = []
    for library, config in ((peft.get_peft_model, peft.LoraConfig), (get_peft_model, LoraConfig)):
        model = library(make(architecture), config(**chosen))
        shake(model)
        model(input_ids=token_ids(), labels=labels).loss.backward()
        named = {name.removeprefix("base_model.model."): p.grad for name, p in model.named_parameters()}
        grads.append({name: grad for name, grad in named.items() if grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, true in grads[0].items():
        torch.testing.assert_close(grads[1][name], true, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("architecture", LINEARS)
def test_merged_equals_the_adapter_and_loads_as_a_plain_model(architecture: str, tmp_path: Path) -> None:
    model = get_peft_model(make(architecture), LoraConfig(**settings(architecture, "plain")))
    shake(model)
    wanted = model(token_ids()).logits
    merged = model.merge_and_unload()
    assert type(merged) is type(make(architecture))
    merged.save_pretrained(tmp_path)
    plain = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(plain(token_ids()).logits, wanted, rtol=0, atol=1e-5)
