"""VeRA against ``peft``: random matrices, outputs, gradients, merged weights, files; the matrices are held once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.tiny import make, token_ids
from lorakeet import LoraConfig, PeftModel, VeraConfig, get_peft_model
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.adapter.inspection_text import inspection_text
from lorakeet.errors import AdapterError, ConfigError, TargetError
from lorakeet.peft_api.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from lorakeet.quant.quantize import quantize_

pytestmark = pytest.mark.filterwarnings("ignore")

SHARED: dict[str, Any] = {"r": 12, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
IDS = token_ids(2, 9)
PREFIX = "base_model.model."


def adapted(model: nn.Module | None = None, own: Any = None, **more: Any) -> PeftModel:
    settings = LoraConfig(vera_config=own or VeraConfig(projection_prng_key=5), **{**SHARED, **more})
    return get_peft_model(make("llama") if model is None else model, settings)


def shaken(model: Any = None, **more: Any) -> PeftModel:
    """Return a model with an adapter that changes the answers."""
    made = adapted(model, **more)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if ".lora_lambda" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return made.eval()


def pefts(ours: PeftModel, model: Any = None, **more: Any) -> Any:
    """Return peft's model with the same vectors, on the random matrices that it draws itself."""
    settings = peft.VeraConfig(projection_prng_key=5, **{**SHARED, **more})
    theirs = peft.get_peft_model(make("llama") if model is None else model, settings)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "vera_lambda" in name:
                p.copy_(own[name.removeprefix(PREFIX).replace("vera_", "lora_")])
    return theirs


def test_outputs_gradients_and_merged_weights_are_those_of_peft() -> None:
    ours = shaken().train()
    theirs = pefts(ours).train()
    first, second = ours(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=1e-5)
    first.loss.backward()
    second.loss.backward()
    gradients = {n.removeprefix(PREFIX).replace("vera_", "lora_"): p.grad for n, p in theirs.named_parameters()}
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, grad in gradients.items() if grad is not None} and trained
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)
    assert ours.get_nb_trainable_parameters()[0] == 3 * (12 + 32) + 3 * (12 + 40)
    before = ours.eval()(IDS).logits
    assert ours.merge_adapter().effect > 1e-2
    torch.testing.assert_close(ours(IDS).logits, before, rtol=0, atol=1e-5)
    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, p in ours.named_parameters():
        if ".base_layer." in name:
            torch.testing.assert_close(p, merged[name.replace(".base_layer", "")], rtol=1e-5, atol=1e-5)


def test_the_random_matrices_are_held_once() -> None:
    model, bare = adapted(), make("llama")
    assert torch.equal(model(IDS).logits, bare(IDS).logits)
    for each in (model, copy.deepcopy(model), model.to(torch.float64)):
        pairs = [layer.pair("default") for layer in each.lora_layers()]
        assert len({a.shared.A.data_ptr() for a, _ in pairs}) == len({b.shared.B.data_ptr() for _, b in pairs}) == 1
        assert pairs[0][0].weight.shape == (12, 32)
    before = {name for name, _ in model.named_parameters()}
    model.delete_adapter("default")
    assert not any("lora_" in name for name, _ in [*model.named_parameters(), *model.named_buffers()]) and before


@pytest.mark.parametrize("keeps", [True, False])
def test_files_travel_both_ways(keeps: bool, tmp_path: Path) -> None:
    own = VeraConfig(projection_prng_key=5, save_projection=keeps)
    ours = shaken(own=own, lora_dropout=0.1)
    with torch.no_grad():
        ours.lora_layers()[0].pair("default")[0].shared.A.mul_(1.5 if keeps else 1.0)  # not those of the seed
    expected = ours(IDS).logits
    ours.save_pretrained(tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "VERA" and settings["vera_dropout"] == 0.1 and "lora_alpha" not in settings
    keys = load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    assert ("base_model.vera_A" in keys) is keeps and len(keys) == 12 + 2 * keeps
    in_peft = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(in_peft(IDS).logits, expected, rtol=0, atol=1e-5)
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "ours")
    assert torch.equal(again(IDS).logits, expected)
    assert again.peft_config["default"].vera_config == own and again.peft_config["default"].lora_dropout == 0.1
    in_peft.save_pretrained(tmp_path / "theirs")
    from_peft = PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")
    torch.testing.assert_close(from_peft(IDS).logits, expected, rtol=0, atol=1e-5)
    copied = adapted(own=own).eval()
    tensors = get_peft_model_state_dict(ours)
    assert tensors.keys() == keys and not any(set_peft_model_state_dict(copied, tensors))
    assert torch.equal(copied(IDS).logits, expected)
    found = inspect_adapter(tmp_path / "ours")
    assert not found["problems"] and found["learned"] and found["readers"]["peft"]["can"] and not found["trained_whole"]
    assert not found["readers"]["vLLM"]["can"] and "VERA" not in inspection_text(found)


def test_a_missing_tensor_and_an_untrained_adapter_are_told(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="every B is zero"):
        PeftModel.from_pretrained(make("llama"), tmp_path, allow_untrained=False)
    without = VeraConfig(projection_prng_key=5, save_projection=False)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    shaken(own=without).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=r"missing tensors \(2\): base_model.vera_A, base_model.vera_B"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


def test_it_acts_on_8_bits_and_beside_others() -> None:
    bare = make("llama").requires_grad_(False)
    assert quantize_(bare)
    model = shaken(copy.deepcopy(bare))
    alone = model(IDS).logits
    model.add_adapter("plain", LoraConfig(**SHARED))
    model.add_adapter("second", LoraConfig(vera_config=True, **{**SHARED, "r": 7, "target_modules": ["q_proj"]}))
    mixed = model(IDS, adapter_names=["default", "second"]).logits
    torch.testing.assert_close(mixed[0], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], bare(IDS).logits[1], rtol=0, atol=1e-5)
    model.set_adapter(["default", "plain"])
    torch.testing.assert_close(model(IDS).logits, alone, rtol=0, atol=1e-5)
    model.set_adapter("default")
    again = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert again.shape == (2, 13)


def test_a_conv1d_and_layers_of_other_sizes() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), Conv1D(5, 8), nn.Linear(5, 9, bias=False)), torch.randn(3, 6)
    targets = {"target_modules": ["0", "1", "2"], "task_type": None}
    ours = shaken(copy.deepcopy(model), **targets)
    assert ours[0].pair("default")[0].shared.A.shape == (12, 8) and ours[2].pair("default")[0].shared.B.shape == (9, 12)
    before = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before)
    second = {"target_modules": ["1"], "task_type": None}
    ours = shaken(copy.deepcopy(model), **second)
    torch.testing.assert_close(ours(x), pefts(ours, copy.deepcopy(model), **second)(x))


def test_what_it_cannot_do_is_refused() -> None:
    for settings, message in (
        ({"lora_alpha": 16}, "vera_config with lora_alpha=16, expected it left out"),
        ({"rank_pattern": {"q_proj": 3}}, "vera_config with rank_pattern"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', expected true or false"),
        ({"adalora_config": True, "r": 12}, "the settings choose AdaLoRA and VeRA"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapted(**settings)
    with pytest.raises(ConfigError, match="d_initial = 0: expected greater than 0"):
        VeraConfig(d_initial=0)
    with pytest.raises(TargetError, match="is a Embedding, which VeRA cannot adapt"):
        adapted(target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match="is a VeRA adapter, which cannot be combined"):
        shaken().add_weighted_adapter(["default"], [1.0], "sum")
