"""``target_parameters`` of other models than Mixtral and Qwen-MoE, and settings that are refused."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from helpers.tiny import shake
from helpers.tiny_experts import EXPERTS, IDS, dense_twin, moe
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import ConfigError, TargetError
from lorakeet.lora.inject import plan_injection

pytestmark = pytest.mark.filterwarnings("ignore")


def test_experts_stored_the_other_way_round(tmp_path):
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        vocab_size=61, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=1,
    )  # fmt: skip
    base = tf.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**EXPERTS))
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    shapes = {layer.base_layer.name: layer.lora_A["default"].weight.shape for layer in model.lora_layers()[1:3]}
    assert shapes == {"gate_up_proj": (12, 16), "down_proj": (12, 12)}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
    twin = dense_twin(model, copy.deepcopy(base))
    torch.testing.assert_close(twin(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)


class Outer(nn.Module):
    """A module with an adapted parameter of its own and adapted layers inside."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(7, 6))
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x + self.position)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.scale = self.Inner(), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_layers_within_the_module_of_an_adapted_parameter(tmp_path):
    chosen = {"target_modules": ["linear"], "target_parameters": ["position"], "r": 2}
    x = torch.randn(2, 7, 6)
    theirs = peft.get_peft_model(Outer(), peft.LoraConfig(**chosen))
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = PeftModel.from_pretrained(Outer(), tmp_path / "theirs")
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "ours")
    assert "base_model.model.inner.base_layer.linear.lora_A.weight" in load_file(
        tmp_path / "ours" / "adapter_model.safetensors"
    )
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(Outer(), tmp_path / "ours")(x), theirs(x), rtol=0, atol=1e-6
    )
    wanted = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"target_parameters": ["gate_proj"], "target_modules": []},
            "'gate_proj' matches no parameter.*also no `target_parameters` found",
        ),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "belongs to a layer"),
        ({"target_parameters": ["norm.weight"]}, r"torch.float32 \[16\], expected"),
        ({"target_parameters": ["down_proj"], "rank_pattern": {"gate_up_proj": 2}}, "rank_pattern 'gate_up_proj'"),
        ({"target_modules": ["up_proj"]}, "'up_proj'"),
    ],
)
def test_wrong_settings_are_reported_before_anything_is_changed(settings, says):
    model = moe()
    with pytest.raises(TargetError, match=says) as caught:
        get_peft_model(model, LoraConfig(**settings))
    assert "target_parameters=['down_proj', 'gate_up_proj']" in caught.value.hint
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_parameter_of_the_model_itself_has_no_name_in_the_file():
    with pytest.raises(TargetError, match="parameter of the model itself"):
        get_peft_model(Outer(), LoraConfig(target_parameters=["scale"], target_modules=[]))


def test_layers_and_parameters_keep_apart():
    model = get_peft_model(moe(), LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]))
    with pytest.raises(TargetError, match="another adapter's target_parameters"):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model = get_peft_model(moe(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match="belongs to a layer"):
        model.add_adapter("second", LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]))
    model = get_peft_model(moe("qwen2_moe"), LoraConfig(**EXPERTS))
    added = model.add_adapter("second", LoraConfig(target_modules=["down_proj"]))  # the shared expert's, a layer
    assert [target.name for target in added.targets] == [
        f"model.layers.{n}.mlp.shared_expert.down_proj" for n in (0, 1)
    ]


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.1}, {"lora_bias": True}, {"fan_in_fan_out": True}], ids=str)
def test_settings_that_act_on_inputs_and_outputs_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        LoraConfig(target_parameters=["down_proj"], **setting)


def test_a_plan_names_parameters_and_warns_of_experts_that_it_leaves_out(caplog):
    what = plan_injection(moe(), LoraConfig(target_modules=["q_proj"], target_parameters={"gate_up_proj"}, r=2))
    assert what.describe() == "2 layers (2 q_proj) and 2 parameters (2 gate_up_proj), rank 2"
    assert not caplog.text
    plan_injection(moe(), LoraConfig(target_modules="all-linear"))
    assert "all-linear does not adapt them; target_parameters=['down_proj', 'gate_up_proj'] does" in caplog.text
    plan_injection(moe(), LoraConfig(target_parameters=["down_proj"], layers_to_transform=[1]))
    assert "layers_to_transform applies to target_modules only" in caplog.text
    with torch.device("meta"):
        ghost = tf.MixtralForCausalLM(moe().config)
    assert plan_injection(ghost, LoraConfig(**EXPERTS)) == plan_injection(moe(), LoraConfig(**EXPERTS))
