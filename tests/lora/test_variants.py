"""The door for variants: DoRA, written here and added by one call, compared with ``peft``'s from settings to file."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import peft
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
from lorakeet.quant.protocol import dense_weight

pytestmark = pytest.mark.filterwarnings("ignore")

MAGNITUDE = "lora_magnitude_vector"
SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
Q = "base_model.model.model.layers.1.self_attn.q_proj"
IDS = token_ids(3, 9)


class Dora(Variant):
    """W' = m · (W + s·B·A) / ‖W + s·B·A‖, each row with its magnitude m (Liu et al. 2024, arXiv:2402.09353)."""

    name = "DoRA"
    settings: ClassVar[dict[str, Any]] = {"use_dora": False}
    parameters = (MAGNITUDE,)
    additive = False
    refused_by: ClassVar[dict[str, str]] = {"vLLM": "use_dora is refused"}

    def settings_error(self, settings):
        return None if isinstance(settings["use_dora"], bool) else "use_dora is not a boolean"

    def unsupported(self, target):
        linear = isinstance(target, nn.Linear)
        return super().unsupported(target) or (None if linear else f"is a {type(target).__name__}, not for DoRA")

    def init(self, layer: AdaptedLayer, adapter: str, settings) -> None:
        super().init(layer, adapter, settings)
        layer.add_parameter(MAGNITUDE, adapter, self._sum(layer, adapter).norm(dim=1).detach())

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias
        scale = layer.parameter(MAGNITUDE, adapter) / self._sum(layer, adapter).norm(dim=1).detach()
        return (scale * (h - bias + layer.low_rank_output(adapter, x)) + bias).to(h.dtype)

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        total = weight + layer.delta(adapter)
        return layer.parameter(MAGNITUDE, adapter)[:, None] * total / total.norm(dim=1, keepdim=True)

    def _sum(self, layer: AdaptedLayer, adapter: str) -> Tensor:
        return dense_weight(layer.base_layer, torch.float32) + layer.delta(adapter)


@pytest.fixture
def dora() -> Iterator[None]:
    register(Dora())
    yield
    unregister("DoRA")


def adapted(**more: Any) -> PeftModel:
    torch.manual_seed(4)
    return get_peft_model(make("llama"), LoraConfig(**{"use_dora": True, **SETTINGS, **more}))


def shaken(**more: Any) -> PeftModel:
    model = adapted(**more)
    magnitudes = {name: p.detach().clone() for name, p in model.named_parameters() if MAGNITUDE in name}
    shake(model)
    with torch.no_grad():
        for name, value in magnitudes.items():
            parameter = model.get_parameter(name)
            parameter.mul_(0.1).add_(value)
    return model.eval()


def test_a_new_adapter_changes_nothing_and_its_parameters_are_trained(dora: None) -> None:
    model = adapted()
    torch.testing.assert_close(model(IDS).logits, make("llama")(IDS).logits, rtol=0, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    magnitudes = {name: p for name, p in model.named_parameters() if MAGNITUDE in name}
    assert len(magnitudes) == 6
    before = {name: p.detach().clone() for name, p in magnitudes.items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(p, before[name]) for name, p in magnitudes.items())


def test_forward_and_gradients_are_those_of_peft(dora: None, tmp_path: Path) -> None:
    ours = shaken()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    assert theirs.peft_config["default"].use_dora
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    mine = {name: p.grad for name, p in ours.named_parameters() if ".lora_" in name}
    assert len(mine) == 18
    for name, p in theirs.named_parameters():
        if ".lora_" in name:
            own = name.removeprefix("base_model.model.").replace(f"{MAGNITUDE}.default.weight", f"{MAGNITUDE}.default")
            torch.testing.assert_close(mine[own], p.grad, rtol=1e-4, atol=1e-6)


def test_merged_is_forward_and_unmerged_is_the_old_bits(dora: None) -> None:
    model = shaken()
    before, weights = model(IDS).logits, {n: p.clone() for n, p in model.named_parameters()}
    report = model.merge_adapter()
    assert report.effect > 1e-2
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-5)
    model.unmerge()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=0, atol=1e-5)


def test_it_is_saved_under_its_own_names_and_loaded(dora: None, tmp_path: Path) -> None:
    model = shaken()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition("lora_")[2] for key in tensors} == {"A.weight", "B.weight", "magnitude_vector"}
    assert tensors[f"{Q}.{MAGNITUDE}"].shape == (32,)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert "use_dora | yes" in (tmp_path / "README.md").read_text()


def test_an_adapter_of_peft_is_loaded(dora: None, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(use_dora=True, init_lora_weights=False, **SETTINGS))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make("llama"), tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits, rtol=0, atol=1e-5)


def test_inspect_knows_its_tensors(dora: None, tmp_path: Path) -> None:
    shaken().save_pretrained(tmp_path)
    found = inspect_adapter(tmp_path)
    assert not found["problems"] and not found["trained_whole"] and found["settings"]["use_dora"] is True
    assert found["layers"][0]["parameters"] == 3 * (32 + 40) + 40
    assert found["readers"]["vLLM"] == {"can": False, "why": ["use_dora is refused"]}
    assert found["readers"]["peft"]["can"] and "tensors other than A and B" in found["readers"]["llama.cpp"]["why"][0]
    assert "use_dora=True" in inspection_text(found)


def test_a_missing_tensor_is_named(dora: None, tmp_path: Path) -> None:
    shaken().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[f"{Q}.{MAGNITUDE}"]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert inspect_adapter(tmp_path)["problems"] == [f"model.layers.1.self_attn.q_proj has no {MAGNITUDE}"]
    with pytest.raises(AdapterError, match=rf"missing tensors \(1\): {Q}.{MAGNITUDE}"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


def test_without_the_variant_its_adapters_are_refused(tmp_path: Path) -> None:
    register(Dora())
    shaken().save_pretrained(tmp_path)
    unregister("DoRA")
    with pytest.raises(ConfigError, match="use_dora=True, which this version"):
        PeftModel.from_pretrained(make("llama"), tmp_path)
    with pytest.raises(ConfigError, match="use_dora=True"):
        LoraConfig(use_dora=True)


def test_beside_plain_adapters(dora: None) -> None:
    model = shaken()
    alone = model(IDS).logits
    model.add_adapter("plain", LoraConfig(**SETTINGS))
    shake(model, "plain", seed=8)
    mixed = model(IDS, adapter_names=["plain", "default", "__base__"]).logits
    torch.testing.assert_close(mixed[1], alone[1], rtol=0, atol=1e-5)
    with pytest.raises(AdapterError, match="'default' is a DoRA adapter"):
        model.set_adapter(["plain", "default"])
    with pytest.raises(AdapterError, match="'default' is a DoRA adapter, which cannot be combined"):
        model.add_weighted_adapter(["default", "plain"], [1, 1], "sum")
    model.delete_adapter("default")
    assert not any(MAGNITUDE in name for name, _ in model.named_parameters())
    model.set_adapter("plain")
    torch.testing.assert_close(mixed[0], model(IDS).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding, not for DoRA"),
        ({"target_modules": ["q_proj"], "target_parameters": ["norm.weight"]}, r"norm.weight' is torch.float32 \[32\]"),
    ],
)
def test_layers_that_it_cannot_adapt_are_refused(dora: None, settings: dict, message: str) -> None:
    model = make("llama")
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, LoraConfig(use_dora=True, **settings))
    assert not isinstance(model, PeftModel)


def test_parameters_and_tied_layers_are_refused(dora: None) -> None:
    experts = build(tf.AutoModelForCausalLM, "mixtral")
    with pytest.raises(TargetError, match=r"gate_up_proj' is a parameter, which DoRA cannot adapt"):
        get_peft_model(experts, LoraConfig(use_dora=True, target_modules=[], target_parameters=["gate_up_proj"]))
    with pytest.raises(TargetError, match="ensure_weight_tying does not work with DoRA"):
        adapted(target_modules=["lm_head"], ensure_weight_tying=True)


def test_values_of_its_settings_are_checked(dora: None) -> None:
    with pytest.raises(ConfigError, match="use_dora is not a boolean"):
        LoraConfig(use_dora="yes")
    assert LoraConfig(use_dora=False).variant.name == LoraConfig().variant.name == "LoRA"


def test_plain_lora_runs_fused_and_the_variant_does_not(dora: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("lorakeet.lora.linear.lora_linear", lambda x, *rest: calls.append(x))
    layers = [model.get_submodule("model.layers.0.self_attn.q_proj") for model in (adapted(), adapted(use_dora=False))]
    layers[0](torch.ones(2, 32))
    assert not calls
    layers[1](torch.ones(2, 32))
    assert len(calls) == 1


def test_registering_is_checked() -> None:
    class Wrong(Dora):
        parameters = ("magnitude",)

    class Unchosen(Dora):
        settings: ClassVar[dict[str, Any]] = {}

    class Second(Dora):
        name = "second"

    with pytest.raises(ValueError, match="expected names that begin with 'lora_'"):
        register(Wrong())
    with pytest.raises(ValueError, match="no settings"):
        register(Unchosen())
    register(Dora())
    try:
        with pytest.raises(ValueError, match="'DoRA' is registered already"):
            register(Dora())
        register(Second())
        with pytest.raises(ConfigError, match="the settings choose DoRA and second"):
            chosen_variant({"use_dora": True})
    finally:
        unregister("DoRA")
        unregister("second")
