"""DoRA beyond its equality with ``peft``: dropout, formats of the base, norms that are kept, refusals, settings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import nn

from helpers.tiny import make, token_ids
from helpers.tiny_architectures import build
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.adapter.inspection_text import inspection_text
from lorakeet.errors import ConfigError, TargetError
from lorakeet.lora.variants.dora import MAGNITUDE
from lorakeet.quant.protocol import dense_weight
from lorakeet.quant.quantize import quantize_

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "use_dora": True}
IDS = token_ids(3, 9)


def shaken(base: Any = None, **more: Any) -> Any:
    """Adapt a tiny model, with values as after training."""
    torch.manual_seed(4)
    settings = {**SETTINGS, "init_lora_weights": False, "task_type": "CAUSAL_LM", **more}
    model = get_peft_model(make("llama") if base is None else base, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if MAGNITUDE in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model.eval()


def dense_output(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute the paper's equation 5 with dense matrices in fp64."""
    a, b = (matrix.double() for matrix in layer.matrices("default"))
    total = dense_weight(layer.base_layer, torch.float64) + layer.scaling["default"] * (b @ a)
    m = layer.part(MAGNITUDE, "default").weight.double()
    weight = m[:, None] * total / total.norm(dim=1, keepdim=True)
    bias = layer.base_layer.bias
    return nn.functional.linear(x.double(), weight, None if bias is None else bias.double())


def one_layer(dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 24)).to(dtype)
    model = get_peft_model(
        base, LoraConfig(**{**SETTINGS, "target_modules": ["0"], "init_lora_weights": False, **more})
    )
    return model[0], torch.randn(50, 40).to(dtype)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.06)])
def test_the_equation(dtype: torch.dtype, atol: float) -> None:
    layer, x = one_layer(dtype)
    h = layer(x)
    assert h.dtype == dtype
    torch.testing.assert_close(h.double(), dense_output(layer, x), rtol=0, atol=atol)
    handle = layer.base_layer.register_forward_hook(lambda *args: None)  # the other path
    torch.testing.assert_close(layer(x), h, rtol=0, atol=atol)
    handle.remove()
    layer.half()
    torch.testing.assert_close(layer(x.half()).double(), dense_output(layer, x), rtol=0, atol=0.06)


def test_dropout_acts_as_in_the_authors_code() -> None:
    layer, x = one_layer(lora_dropout=0.4)
    layer.train()
    torch.manual_seed(7)
    h = layer(x)
    torch.manual_seed(7)
    dropped = layer.dropped("default", x)
    assert 0.3 < float((dropped == 0).float().mean()) < 0.5
    c = layer.variants["default"].output_scale(layer, "default")
    wanted = (
        layer.base_layer(x) + (c - 1) * (dropped @ layer.base_layer.weight.T) + c * layer.low_rank("default", dropped)
    )
    torch.testing.assert_close(h, wanted, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(h, layer.eval()(x))


def test_norms_follow_every_change_of_their_weights() -> None:
    layer, x = one_layer()
    a, b = layer.pair("default")
    known = layer.part(MAGNITUDE, "default")

    def change_base() -> None:
        layer.base_layer.load_state_dict({key: 2 * value for key, value in layer.base_layer.state_dict().items()})

    def replace_base() -> None:
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() * 3, requires_grad=False)

    changes = [
        lambda: a.weight.data.mul_(1.5),
        lambda: setattr(b.weight, "data", b.weight.data * 0.5),
        lambda: layer.set_scale("default", 3.0),
        change_base,
        replace_base,
        lambda: layer.double(),
    ]
    with torch.no_grad():
        for change in changes:
            layer(x)
            first = known._known
            layer(x)
            assert known._known is first
            change()
            own = x.to(layer.base_layer.weight.dtype)
            torch.testing.assert_close(layer(own).double(), dense_output(layer, own), rtol=1e-5, atol=1e-5)
            assert known._known is not first
    assert copy.deepcopy(known)._known is None


def test_norms_of_a_pass_without_gradients_serve_one_with_them() -> None:
    layer, x = one_layer()
    layer.part(MAGNITUDE, "default")._known = None
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.part(MAGNITUDE, "default").weight.grad is not None


def test_a_base_in_8_bits_is_never_dense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = make("llama").requires_grad_(False)
    quantize_(base)
    plain = copy.deepcopy(base)
    monkeypatch.setattr("lorakeet.lora.variants.magnitude._BLOCK", 256)
    sizes: list[int] = []
    kind = type(base.model.layers[0].self_attn.q_proj.quantized_weight())
    rows = kind.rows
    monkeypatch.setattr(kind, "rows", lambda own, ids, dtype: sizes.append(len(ids)) or rows(own, ids, dtype))
    model = shaken(base, target_modules=["q_proj", "up_proj", "embed_tokens"])
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert max(sizes) * 32 <= 256
    x = torch.randn(40, 32)
    torch.testing.assert_close(layer(x).double(), dense_output(layer, x), rtol=0, atol=0.05)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_transformer_has_the_loss_and_gradients_of_peft(tmp_path: Path) -> None:
    ours = shaken(modules_to_save=["lm_head"])
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    assert theirs.peft_config["default"].use_dora
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    mine = {name: p.grad for name, p in ours.named_parameters() if ".lora_" in name}
    assert len(mine) == 18
    for name, p in theirs.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(mine[name.removeprefix("base_model.model.")], p.grad, rtol=1e-4, atol=1e-6)


def test_inspect_and_the_readers(tmp_path: Path) -> None:
    shaken().save_pretrained(tmp_path)
    found = inspect_adapter(tmp_path)
    assert not found["problems"] and not found["trained_whole"] and found["settings"]["use_dora"] is True
    assert found["layers"][0]["parameters"] == 3 * (32 + 40) + 40
    assert found["readers"]["vLLM"] == {"can": False, "why": ["use_dora is refused"]}
    assert found["readers"]["peft"]["can"] and "tensors other than A and B" in found["readers"]["llama.cpp"]["why"][0]
    assert "use_dora=True" in inspection_text(found)
    assert "use_dora | yes" in (tmp_path / "README.md").read_text()


def test_layers_and_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="lora_bias=True is not supported with use_dora=True"):
        LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(TargetError, match="is a MultiheadAttention, which DoRA cannot adapt"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(use_dora=True, target_modules=["0"]))
    experts = build(tf.AutoModelForCausalLM, "mixtral")
    with pytest.raises(TargetError, match="gate_up_proj' is a parameter, which DoRA cannot adapt"):
        get_peft_model(experts, LoraConfig(use_dora=True, target_modules=[], target_parameters=["gate_up_proj"]))


def test_a_runtime_wish_of_peft_is_left_out() -> None:
    config = LoraConfig(use_dora=True, runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert config.variant.name == "DoRA" and "runtime_config" not in config.to_dict()


def test_a_weight_of_zeros_stays_finite() -> None:
    base = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(base[0].weight)
    model = get_peft_model(base, LoraConfig(use_dora=True, target_modules=["0"]))
    h = model(torch.ones(2, 4))
    h.sum().backward()
    assert torch.equal(h, base[0].base_layer.bias.expand(2, 3))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
