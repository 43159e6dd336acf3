"""The door for variants: one that is written here and added by one call, from settings to file."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.tiny import make, shake, token_ids
from helpers.tiny_architectures import build
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.adapter.inspection_text import inspection_text
from lorakeet.errors import AdapterError, ConfigError, TargetError
from lorakeet.lora.variants import AdaptedLayer, Variant, chosen_variant, register, unregister

pytestmark = pytest.mark.filterwarnings("ignore")

GAIN = "lora_gain"
SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
Q = "base_model.model.model.layers.1.self_attn.q_proj"
IDS = token_ids(3, 9)


class Gain(Variant):
    """W' = g · (W + s·B·A), each output channel with a gain g."""

    name = "Gain"
    settings: ClassVar[dict[str, Any]] = {"use_gain": False}
    parameters = (GAIN,)
    additive = False
    refused_by: ClassVar[dict[str, str]] = {"vLLM": "use_gain is refused"}

    def settings_error(self, settings):
        return None if isinstance(settings["use_gain"], bool) else "use_gain is not a boolean"

    def unsupported(self, target):
        linear = isinstance(target, nn.Linear)
        return super().unsupported(target) or (None if linear else f"is a {type(target).__name__}, not for Gain")

    def init(self, layer: AdaptedLayer, adapter: str, settings) -> None:
        super().init(layer, adapter, settings)
        layer.add_part(GAIN, adapter, nn.Parameter(torch.ones(len(layer.matrices(adapter)[1]))))

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        low = layer.low_rank(adapter, layer.dropped(adapter, x))
        gain = layer.part(GAIN, adapter)
        return h + (gain - 1) * layer.without_bias(h) + gain * low

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        return layer.for_weight(layer.part(GAIN, adapter)) * (weight + layer.delta(adapter))


@pytest.fixture
def gain() -> Iterator[None]:
    register(Gain())
    yield
    unregister("Gain")


def adapted(**more: Any) -> PeftModel:
    torch.manual_seed(4)
    return get_peft_model(make("llama"), LoraConfig(**{"use_gain": True, **SETTINGS, **more}))


def shaken(**more: Any) -> PeftModel:
    model = adapted(**more)
    gains = {name: p.detach().clone() for name, p in model.named_parameters() if GAIN in name}
    shake(model)
    with torch.no_grad():
        for name, value in gains.items():
            parameter = model.get_parameter(name)
            parameter.mul_(0.1).add_(value)
    return model.eval()


def test_a_new_adapter_changes_nothing_and_its_parameters_are_trained(gain: None) -> None:
    model = adapted()
    torch.testing.assert_close(model(IDS).logits, make("llama")(IDS).logits, rtol=0, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    gains = {name: p for name, p in model.named_parameters() if GAIN in name}
    assert len(gains) == 6
    before = {name: p.detach().clone() for name, p in gains.items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(p, before[name]) for name, p in gains.items())


def test_merged_is_forward_and_unmerged_is_the_old_bits(gain: None) -> None:
    model = shaken()
    before, weights = model(IDS).logits, {n: p.clone() for n, p in model.named_parameters()}
    report = model.merge_adapter()
    assert report.effect > 1e-2
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-5)
    model.unmerge()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=0, atol=1e-5)


def test_it_is_saved_under_its_own_names_and_loaded(gain: None, tmp_path: Path) -> None:
    model = shaken()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition("lora_")[2] for key in tensors} == {"A.weight", "B.weight", "gain"}
    assert tensors[f"{Q}.{GAIN}"].shape == (32,)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_gain"] is True
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert "use_gain | yes" in (tmp_path / "README.md").read_text()


def test_inspect_knows_its_tensors(gain: None, tmp_path: Path) -> None:
    shaken().save_pretrained(tmp_path)
    found = inspect_adapter(tmp_path)
    assert not found["problems"] and not found["trained_whole"] and found["settings"]["use_gain"] is True
    assert found["layers"][0]["parameters"] == 3 * (32 + 40) + 40
    assert found["readers"]["vLLM"] == {"can": False, "why": ["use_gain is refused"]}
    assert found["readers"]["peft"]["can"] and "tensors other than A and B" in found["readers"]["llama.cpp"]["why"][0]
    assert "use_gain=True" in inspection_text(found)


def test_a_missing_tensor_is_named(gain: None, tmp_path: Path) -> None:
    shaken().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[f"{Q}.{GAIN}"]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert inspect_adapter(tmp_path)["problems"] == [f"model.layers.1.self_attn.q_proj has no {GAIN}"]
    with pytest.raises(AdapterError, match=rf"missing tensors \(1\): {Q}.{GAIN}"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


def test_without_the_variant_its_adapters_are_refused(tmp_path: Path) -> None:
    register(Gain())
    shaken().save_pretrained(tmp_path)
    unregister("Gain")
    with pytest.raises(ConfigError, match="use_gain=True, which this version"):
        PeftModel.from_pretrained(make("llama"), tmp_path)
    with pytest.raises(ConfigError, match="unknown argument of LoraConfig 'use_gain'"):
        LoraConfig(use_gain=True)


def test_beside_plain_adapters(gain: None) -> None:
    model = shaken()
    alone = model(IDS).logits
    model.add_adapter("plain", LoraConfig(**SETTINGS))
    shake(model, "plain", seed=8)
    mixed = model(IDS, adapter_names=["plain", "default", "__base__"]).logits
    torch.testing.assert_close(mixed[1], alone[1], rtol=0, atol=1e-5)
    model.set_adapter(["plain", "default"])  # one after the other
    together = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, together, rtol=0, atol=1e-5)
    model.unmerge()
    with pytest.raises(AdapterError, match="'default' is a Gain adapter, which cannot be combined"):
        model.add_weighted_adapter(["default", "plain"], [1, 1], "sum")
    model.delete_adapter("default")
    assert not any(GAIN in name for name, _ in model.named_parameters())
    model.set_adapter("plain")
    torch.testing.assert_close(mixed[0], model(IDS).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding, not for Gain"),
        ({"target_modules": ["q_proj"], "target_parameters": ["norm.weight"]}, r"norm.weight' is torch.float32 \[32\]"),
    ],
)
def test_layers_that_it_cannot_adapt_are_refused(gain: None, settings: dict, message: str) -> None:
    model = make("llama")
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, LoraConfig(use_gain=True, **settings))
    assert not isinstance(model, PeftModel)


def test_parameters_and_tied_layers_are_refused(gain: None) -> None:
    experts = build(tf.AutoModelForCausalLM, "mixtral")
    with pytest.raises(TargetError, match=r"gate_up_proj' is a parameter, which Gain cannot adapt"):
        get_peft_model(experts, LoraConfig(use_gain=True, target_modules=[], target_parameters=["gate_up_proj"]))
    with pytest.raises(TargetError, match="ensure_weight_tying does not work with Gain"):
        adapted(target_modules=["lm_head"], ensure_weight_tying=True)


def test_values_of_its_settings_are_checked(gain: None) -> None:
    with pytest.raises(ConfigError, match="use_gain is not a boolean"):
        LoraConfig(use_gain="yes")
    assert LoraConfig(use_gain=False).variant.name == LoraConfig().variant.name == "LoRA"


def test_plain_lora_runs_fused_and_the_variant_does_not(gain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("lorakeet.lora.linear.lora_linear", lambda x, *rest: calls.append(x))
    layers = [model.get_submodule("model.layers.0.self_attn.q_proj") for model in (adapted(), adapted(use_gain=False))]
    layers[0](torch.ones(2, 32))
    assert not calls
    layers[1](torch.ones(2, 32))
    assert len(calls) == 1


def test_registering_is_checked() -> None:
    class Wrong(Gain):
        parameters = ("magnitude",)

    class Unchosen(Gain):
        settings: ClassVar[dict[str, Any]] = {}

    class Second(Gain):
        name = "second"

    with pytest.raises(ValueError, match="expected names that begin with 'lora_'"):
        register(Wrong())
    with pytest.raises(ValueError, match="no settings"):
        register(Unchosen())
    register(Gain())
    try:
        with pytest.raises(ValueError, match="'Gain' is registered already"):
            register(Gain())
        register(Second())
        with pytest.raises(ConfigError, match="the settings choose Gain and second"):
            chosen_variant({"use_gain": True})
    finally:
        unregister("Gain")
        unregister("second")
