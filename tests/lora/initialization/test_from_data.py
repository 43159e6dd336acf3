"""LoftQ and EVA: equations, ranks and files, the latter held against ``peft`` where its random projection is exact."""

from __future__ import annotations

from pathlib import Path

import peft
import peft.tuners.lora.eva as theirs
import pytest
import torch
from torch import nn

import lorakeet
from helpers.tiny import make, token_ids
from lorakeet import EvaConfig, LoraConfig, PeftModel, get_peft_model
from lorakeet.config import QUANTIZED_FORMATS
from lorakeet.errors import AdapterError, ConfigError
from lorakeet.lora.initialization.eva import InputSvd
from lorakeet.quant.hf_quantizer import FORMATS
from lorakeet.quant.protocol import dense_weight
from lorakeet.quant.quantize import quantize_

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "down_proj"]
BATCHES = [{"input_ids": token_ids(8, 20, seed=seed)} for seed in range(3)]


def rounding(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return FORMATS[QUANTIZED_FORMATS[bits]].quantize(weight, False).dequantize()


# -- EVA --------------------------------------------------------------------------------------------------------------


def test_an_incremental_svd_is_that_of_all_inputs_at_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(120, 24) * torch.linspace(3, 0.1, 24) + 5
    state = InputSvd(wanted=24, tau=0.99)
    for batch in x.split(40):
        state.update(batch)
    _, values, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(state.values, values, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close((state.directions * vh).sum(1).abs(), torch.ones(24), atol=1e-3, rtol=0)
    assert sum(state.shares) == pytest.approx(1, abs=1e-4)


def test_eva_equals_peft() -> None:
    settings = {"r": 8, "target_modules": TARGETS, "init_lora_weights": "eva", "use_rslora": True}
    for eva in ({}, {"rho": 1.0, "whiten": True}, {"adjust_scaling_factors": False}):
        ours = get_peft_model(make("llama"), LoraConfig(**settings, eva_config=EvaConfig(**eva)))
        other = peft.get_peft_model(make("llama"), peft.LoraConfig(**settings, eva_config=peft.EvaConfig(**eva)))
        before = ours(token_ids()).logits
        directions = lorakeet.get_eva_state_dict(ours, BATCHES)
        found = theirs.get_eva_state_dict(other, BATCHES, show_progress_bar=False)
        found = {name.removeprefix("base_model.model."): a for name, a in found.items()}
        assert {name: len(a) for name, a in directions.items()} == {name: len(a) for name, a in found.items()}
        for name, a in directions.items():
            if a.shape[1] == 32 and not eva:  # then the random projection of peft's SVD loses little
                shared = torch.linalg.svdvals(a[:4] @ found[name][:4].float().T)
                assert shared.min() > 0.98
        lorakeet.initialize_lora_eva_weights(ours, eva_state_dict=directions)
        theirs.initialize_lora_eva_weights(other, eva_state_dict={f"base_model.model.{k}": a for k, a in found.items()})
        assert ours.peft_config["default"].rank_pattern == other.peft_config["default"].rank_pattern
        assert scales(ours) == {k.removeprefix("base_model.model."): s for k, s in scales(other).items()}
        assert torch.equal(ours(token_ids()).logits, before) and ours.trains("default")
        assert (len({layer.r["default"] for layer in ours.lora_layers()}) > 1) == (eva.get("rho") != 1.0)


def scales(model: nn.Module) -> dict[str, float]:
    layers = model.named_modules()
    return {n: layer.scaling["default"] for n, layer in layers if isinstance(getattr(layer, "scaling", None), dict)}


def test_eva_leaves_layers_out_and_its_files_travel(tmp_path: Path) -> None:
    model = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="eva"))
    directions = lorakeet.get_eva_state_dict(model, BATCHES)
    first, second = list(directions)[:2]
    directions |= {first: directions[first][:0], second: directions[second][:1]}
    lorakeet.initialize_lora_eva_weights(model, eva_state_dict=directions)
    assert type(model.get_submodule(first)) is nn.Linear and model.get_submodule(second).r == {"default": 1}
    torch.testing.assert_close(model.get_submodule(second).lora_A["default"].weight, directions[second])
    for parameter in model.adapter_parameters("default"):
        parameter.data.add_(0.1)
    model.save_pretrained(tmp_path)
    for library in (PeftModel, peft.PeftModel):
        loaded = library.from_pretrained(make("llama"), tmp_path)
        torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)
    assert LoraConfig.from_pretrained(tmp_path).eva_config == EvaConfig()


def test_eva_says_what_it_needs() -> None:
    base, eva = make("llama"), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="eva")
    with pytest.raises(AdapterError, match="has no adapter"):
        lorakeet.initialize_lora_eva_weights(base, BATCHES)
    with pytest.raises(AdapterError, match="expected one, or settings"):
        lorakeet.get_eva_state_dict(base, BATCHES)
    assert lorakeet.get_eva_state_dict(base, BATCHES, eva).keys() >= {"model.layers.0.mlp.down_proj"}
    model = get_peft_model(base, eva)
    for batches, message in (([], "empty"), ([{"input_ids": token_ids(1, 2)}], "no batch has 4 tokens")):
        with pytest.raises(AdapterError, match=message):
            lorakeet.initialize_lora_eva_weights(model, batches)
    with pytest.raises(AdapterError, match="no dataloader"):
        lorakeet.initialize_lora_eva_weights(model)
    with pytest.raises(ConfigError, match="rho"):
        EvaConfig(rho=0.5)


# -- LoftQ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "iterations"), [(8, 1), (8, 3), (4, 1), (4, 3)])
def test_loftq_makes_up_for_what_quantization_loses(bits: int, iterations: int, tmp_path: Path) -> None:
    loftq = {"loftq_bits": bits, "loftq_iter": iterations}
    config = LoraConfig(r=8, lora_alpha=24, target_modules=TARGETS, init_lora_weights="loftq", loftq_config=loftq)
    base, model = make("llama"), get_peft_model(make("llama"), config)
    layer, full = model.model.layers[0].mlp.down_proj, base.model.layers[0].mlp.down_proj.weight
    rounded = layer.base_layer.weight
    error = (full - rounded - layer.delta("default")).norm()
    if iterations == 1:
        torch.testing.assert_close(rounded, rounding(full, bits))
        u, sigma, vh = torch.linalg.svd(full - rounded, full_matrices=False)
        torch.testing.assert_close(layer.delta("default"), u[:, :8] * sigma[:8] @ vh[:8], atol=1e-6, rtol=0)
    assert error < 0.9 * (full - rounding(full, bits)).norm()
    out = model(token_ids()).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(make("llama"), tmp_path)(token_ids()).logits, out)


def test_loftq_on_a_base_that_is_quantized_already(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    base = make("llama").requires_grad_(False)
    quantize_(base)
    settings = {"r": 8, "target_modules": TARGETS, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}
    with pytest.warns(UserWarning, match="quantized already"):
        model = get_peft_model(base, LoraConfig(**settings))
    full = make("llama").model.layers[1].self_attn.q_proj.weight
    layer = model.model.layers[1].self_attn.q_proj
    lost = full - dense_weight(layer.base_layer, torch.float32)
    lorakeet.replace_lora_weights_loftq(model, tmp_path, callback=lambda model, name: not name.endswith("v_proj"))
    assert (lost - layer.delta("default")).norm() < 0.9 * lost.norm()
    assert not model.model.layers[1].self_attn.v_proj.delta("default").any()
    with pytest.raises(AdapterError, match="nothing to make up for"):
        plain = get_peft_model(make("llama"), LoraConfig(target_modules=TARGETS))
        lorakeet.replace_lora_weights_loftq(plain, tmp_path)
    with pytest.raises(ConfigError, match="loftq_config"):
        LoraConfig(init_lora_weights="loftq")
    with pytest.raises(ConfigError, match="3 bits and 1 iterations, expected 4 or 8"):
        get_peft_model(make("llama"), LoraConfig(**{**settings, "loftq_config": {"loftq_bits": 3}}))
