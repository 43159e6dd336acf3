"""BD-LoRA and VeLoRA beyond their equality with ``peft``: settings, files, kept memory, inspection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.tiny import make, token_ids
from lorakeet import BdLoraConfig, LoraConfig, PeftModel, VeloraConfig, get_peft_model
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.errors import ConfigError

IDS = token_ids(3, 9)
SETTINGS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False}
BLOCKS = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)


@pytest.mark.parametrize(
    ("more", "key"), [({"use_bdlora": BLOCKS}, "use_bdlora"), ({"velora_config": VeloraConfig(4)}, "velora_config")]
)
def test_files_hold_the_settings_as_plain_values_and_inspect_reads_them(more: dict, key: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(make("llama"), LoraConfig(**SETTINGS, **more, task_type="CAUSAL_LM"))
    model(IDS).logits.sum().backward()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written[key] == vars(more[key])
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert getattr(again.peft_config["default"], key) == more[key]
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
    found = inspect_adapter(tmp_path)
    assert not found["problems"] and not found["trained_whole"] and len(found["layers"]) == 6
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    norm = next(entry["update_norm"] for entry in found["layers"] if "layers.0.self_attn.q_proj" in entry["name"])
    assert norm == pytest.approx(float(layer.delta("default").detach().norm()), rel=1e-5)
    assert not found["readers"]["vLLM"]["can"]
    model.delete_adapter("default")
    assert not any("lora_" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["o_proj"]}}, "q_proj matches neither A nor B"),
        (
            {"use_bdlora": {"target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_"]}},
            "q_proj matches both A and B",
        ),
        ({"use_bdlora": {"target_modules_bd_a": ["_proj"], "nblocks": 3}}, "not divisible by"),
        ({"use_bdlora": {"nblocks": 0}}, "nblocks=0"),
        ({"use_bdlora": {"blocks": 2}}, "of use_bdlora"),
        ({"velora_config": {"num_groups": 0}}, "`num_groups` should be positive"),
        ({"velora_config": {"scale": -1.0}}, "`scale` should be positive"),
        ({"velora_config": {"init_type": "all"}}, "init_type='all'"),
        ({"velora_config": {}, "use_dora": True}, "choose DoRA and VeLoRA"),
    ],
)
def test_settings_that_do_not_fit_are_refused(more: dict, message: str) -> None:
    model = make("llama")
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, LoraConfig(**SETTINGS, **more))
    assert not isinstance(model, PeftModel)


def test_a_layer_outside_of_the_lists_is_plain_lora_where_that_is_allowed() -> None:
    chosen = BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2, match_strict=False)
    model = get_peft_model(make("llama"), LoraConfig(**SETTINGS, use_bdlora=chosen))
    shapes = {name.split(".")[4]: p.shape for name, p in model.named_parameters() if "lora_A" in name}
    assert shapes == {"q_proj": (4, 32), "o_proj": (4, 16)}


def test_velora_keeps_one_number_for_a_group_of_features() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(64, 8)),
        LoraConfig(r=2, target_modules=["0"], velora_config=VeloraConfig(4), init_lora_weights=False),
    ).train()
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    x = torch.randn(1000, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        h = model(x)
    h.sum().backward()
    assert max(sizes) <= 4 * 1000
    assert model[0].lora_A["default"].weight.grad is not None
