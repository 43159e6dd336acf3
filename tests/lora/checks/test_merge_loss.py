"""Merges measured in the weights: what rounding takes of each layer's update, and what is done about it."""

import logging

import pytest
import torch
from torch import nn

from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig, get_peft_model
from lorakeet.errors import MergeError
from lorakeet.lora.checks.merge_loss import ACCEPTED_LOSS, LayerLoss, worst_loss
from lorakeet.lora.linear import LoraLinear

SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
IDS = token_ids(2, 8)


def adapted(dtype=torch.float32, factor=1.0, **settings):
    """Build a tiny Llama in ``dtype`` with an adapter whose B is random and scaled by ``factor``."""
    model = get_peft_model(make("llama").to(dtype), LoraConfig(**SETTINGS | settings))
    shake(model)
    scale(model, factor)
    return model.eval()


@torch.no_grad()
def scale(model, factor, only=".lora_B."):
    for name, parameter in model.named_parameters():
        if only in name and "lora_B" in name:
            parameter.mul_(factor)


def lost(model, before):
    """Measure the share of the whole update that the stored weights do not have."""
    wanted = torch.cat([layer.delta("default").detach().flatten() for layer in model.lora_layers()])
    after = [layer.base_layer.weight.detach().float().flatten() for layer in model.lora_layers()]
    got = torch.cat(after) - torch.cat([weight.float().flatten() for weight in before])
    return float((got - wanted).norm() / wanted.norm())


def weights(model):
    return [layer.base_layer.weight.detach().clone() for layer in model.lora_layers()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1e-1, 1e-3, 1e-4, 1e-5])
def test_a_merge_that_loses_the_update_is_never_silent(dtype, factor, caplog):
    model = adapted(dtype, factor)
    before = weights(model)
    report = model.merge_adapter()
    measured = lost(model, before)
    assert measured <= report.lost * 1.001 + 1e-9  # the worst layer loses at least as much as all together
    assert report.stored == str(dtype).removeprefix("torch.")
    told = any(record.levelno >= logging.WARNING and "too coarse" in record.message for record in caplog.records)
    assert told == (report.lost > ACCEPTED_LOSS) and (told or measured <= ACCEPTED_LOSS)
    if dtype is not torch.float32:
        assert told == (factor <= (1e-4 if dtype is torch.bfloat16 else 1e-5))


def test_an_update_that_is_lost_is_refused_on_demand_and_nothing_is_changed():
    model = adapted(torch.bfloat16, 1e-5)
    before, wanted = weights(model), model(IDS).logits
    with pytest.raises(MergeError, match="bfloat16 is too coarse for this adapter: in 6 of 6 layers") as caught:
        model.merge_adapter(accept_loss=False)
    assert "--accept-loss" in caught.value.hint
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert model.active_adapters == ["default"] and torch.equal(model(IDS).logits, wanted)
    assert model.float().merge_adapter(accept_loss=False).lost < 0.01  # the hint's advice


def test_one_layer_that_is_lost_counts_beside_others_that_are_not():
    model = adapted(torch.bfloat16, 2e-2)
    assert model.merge_adapter(accept_loss=False).lost < 0.1
    model.unmerge()
    scale(model, 1 / 60, "layers.1.self_attn.v_proj")
    with pytest.raises(MergeError, match=r"in 1 of 6 layers .* in model.layers.1.self_attn.v_proj"):
        model.merge_adapter(accept_loss=False)


def test_the_worst_layer_is_one_whose_update_can_be_seen():
    big, small, none = (
        LayerLoss("big", 0.1, 1.0, 10.0),
        LayerLoss("small", 9e-4, 1e-3, 10.0),
        LayerLoss("none", 0, 0, 1),
    )
    assert worst_loss([big, small, none]) is big  # 90 % of a ten-thousandth of the weight
    assert worst_loss([big, LayerLoss("other", 0.09, 0.1, 10.0)]).name == "other"
    assert worst_loss([none]) is None


def test_a_layer_that_is_negligible_does_not_stop_a_merge():
    model = adapted(torch.bfloat16)
    scale(model, 1e-6, "layers.1.self_attn.v_proj")
    assert model.merge_adapter(accept_loss=False).lost < 0.1


def test_experts_are_measured_one_by_one():
    from helpers.tiny_experts import moe

    settings = {"r": 2, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    for factor, refused in ((1.0, False), (1e-5, True)):
        model = get_peft_model(moe().to(torch.bfloat16), LoraConfig(**settings))
        shake(model)
        scale(model, factor)
        if refused:
            with pytest.raises(MergeError, match="too coarse"):
                model.merge_adapter(accept_loss=False)
        else:
            assert 0 < model.merge_adapter(accept_loss=False).lost < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_value_error(value):
    model = adapted()
    with torch.no_grad():
        model.lora_layers()[0].lora_A["default"].weight[0] = value
    before = weights(model)
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(
            ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"
        ):
            call(safe_merge=True)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_fp16_that_overflows_is_refused():
    model = adapted(torch.float16)
    scale(model, 1e7)
    with pytest.raises(MergeError, match="range of torch.float16"):
        model.merge_adapter()


def two_adapters(dtype=torch.float32):
    model = adapted(dtype)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    shake(model)
    return model


def test_one_adapter_merged_after_another_gives_the_bits_of_both_at_once():
    for dtype in (torch.float32, torch.bfloat16):
        together, apart = two_adapters(dtype), two_adapters(dtype)
        together.load_state_dict(apart.state_dict())
        before = weights(apart)
        together.merge_adapter(["default", "second"])
        apart.merge_adapter(["default"])
        apart.merge_adapter(["second"])
        assert torch.equal(together(IDS).logits, apart(IDS).logits)
        assert all(torch.equal(a, b) for a, b in zip(weights(together), weights(apart), strict=True))
        apart.unmerge()
        assert all(torch.equal(a, b) for a, b in zip(before, weights(apart), strict=True))


def test_the_merged_model_holds_both_adapters_of_two_merges(caplog):
    model = two_adapters()
    model.set_adapter(["default", "second"])
    wanted = model(IDS).logits
    model.merge_adapter(["second"])
    model.merge_adapter(["default"])
    assert "second are merged already; default is added" in caplog.text
    assert model.merge_adapter(["second"]).layers == 0 and "nothing to do" in caplog.text
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, wanted, rtol=0, atol=1e-5)


def test_a_second_merge_that_is_refused_leaves_the_first(monkeypatch):
    model = two_adapters()
    model.merge_adapter(["default"])
    before, wanted = weights(model), model(IDS).logits
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".second." in name and "lora_B" in name).fill_(float("nan"))
    with pytest.raises(MergeError):
        model.merge_adapter(["second"])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert torch.equal(model(IDS).logits, wanted)
    model.unmerge()


def test_a_merge_leaves_each_module_in_its_own_mode():
    model = adapted()
    model.train()
    model.model.layers[0].eval()
    model.merge_adapter()
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


def test_a_wrong_formula_is_refused_however_small_the_effect(monkeypatch):
    model = adapted(factor=1e-2)
    honest = LoraLinear.delta
    monkeypatch.setattr(LoraLinear, "delta", lambda self, adapter: honest(self, adapter) * 1.05)
    with pytest.raises(MergeError, match="where the adapter changes them by"):
        model.merge_adapter()


def test_a_half_precision_adapter_is_merged_in_fp32():
    model = get_peft_model(make("llama").to(torch.bfloat16), LoraConfig(**SETTINGS), autocast_adapter_dtype=False)
    shake(model)
    layer = model.lora_layers()[0]
    wanted = (layer.base_layer.weight.float() + layer.delta("default").float()).bfloat16()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, wanted)


def test_a_bias_is_merged_and_measured():
    layer = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    model = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    shake(model)
    with torch.no_grad():
        model[0].lora_B["default"].weight.zero_()
        model[0].lora_B["default"].bias.fill_(1e-6)
    with pytest.raises(MergeError, match="too coarse"):
        model.merge_adapter(accept_loss=False)
