"""Injection: a plan that needs no weights, and errors before anything is changed."""

import pytest
import torch
from torch import nn

from helpers.tiny import EMBEDDING, LINEARS, make
from lorakeet import LoraConfig, get_peft_model
from lorakeet.errors import ConfigError, TargetError
from lorakeet.lora.inject import plan_injection
from lorakeet.lora.layer import LoraLayer


def names(model, **settings):
    return [target.name for target in plan_injection(model, LoraConfig(**settings)).targets]


def untouched(model) -> bool:
    return type(model).__mro__[1].__name__ != "PeftModel" and not any(isinstance(m, LoraLayer) for m in model.modules())


@pytest.mark.parametrize("architecture", LINEARS)
def test_plans_need_no_weights(architecture):
    with torch.device("meta"):
        ghost = type(make(architecture))(make(architecture).config)
    solid = names(make(architecture), target_modules=LINEARS[architecture])
    assert names(ghost, target_modules=LINEARS[architecture]) == solid
    assert len(solid) >= 9


def test_defaults_are_the_query_and_value_projections():
    assert {name.rpartition(".")[2] for name in names(make("llama"))} == {"q_proj", "v_proj"}
    assert {name.rpartition(".")[2] for name in names(make("gpt2"))} == {"c_attn"}


def test_all_linear_leaves_the_head():
    model = make("llama")
    chosen = names(model, target_modules="all-linear")
    assert len(chosen) == 3 * 7 and not any("lm_head" in name for name in chosen)
    assert not any(
        "classifier" in name for name in names(make("bert"), target_modules="all-linear", task_type="SEQ_CLS")
    )


def test_one_layer_by_full_name_regex_and_number():
    model = make("llama")
    assert names(model, target_modules=["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert names(model, target_modules=r".*\.0\..*q_proj") == ["model.layers.0.self_attn.q_proj"]
    assert names(model, target_modules=["q_proj"], layers_to_transform=2) == ["model.layers.2.self_attn.q_proj"]
    assert len(names(model, target_modules=["q_proj", "k_proj"], exclude_modules=r".*\.1\..*")) == 4


@pytest.mark.parametrize(
    ("settings", "says", "hint"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj'", "q_proj"),
        ({"target_modules": ["q_proj", "querry"]}, "'querry'", "all-linear"),
        ({"target_modules": r".*\.query_proj"}, "query_proj", "q_proj"),
        ({"target_modules": []}, "match no layer", "q_proj"),
        ({"target_modules": ["self_attn"]}, "LlamaAttention", "q_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "match no layer", "q_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["lm_haed"]}, "exclude_modules ['lm_haed']", ""),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "[7], this model has layers 0 to 2", ""),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}, "rank_pattern 'v_proj'", ""),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"vproj": 3}}, "alpha_pattern 'vproj'", ""),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "'lm_haed'", ""),
    ],
)
def test_a_match_of_nothing_or_a_part_is_an_error_before_anything_is_touched(settings, says, hint):
    model = make("llama")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(TargetError) as caught:
        get_peft_model(model, LoraConfig(**settings))
    assert says in caught.value.message
    assert hint in (caught.value.hint or "")
    assert untouched(model)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_every_complaint_is_made_at_once():
    with pytest.raises(TargetError) as caught:
        plan_injection(make("llama"), LoraConfig(target_modules=["quark", "q_proj", "blob"], modules_to_save=["hat"]))
    assert all(word in caught.value.message for word in ("'quark'", "'blob'", "'hat'"))


def test_unknown_architecture_without_targets():
    with pytest.raises(TargetError, match="no default target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


def test_multihead_attention_would_pass_the_update_by():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(TargetError, match="MultiheadAttention"):
        get_peft_model(model, LoraConfig(target_modules=["out_proj"]))


def test_a_layer_that_only_some_blocks_have_is_reported(caplog):
    model = make("llama")
    model.model.layers[1].mlp.special = nn.Linear(3, 3)
    plan_injection(model, LoraConfig(target_modules=["q_proj", "special", "model.layers.0.mlp.up_proj"]))
    assert "'special' is in 1 of 3 layers" in caplog.text and "up_proj" not in caplog.text


def test_any_module_can_be_adapted():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 5)
    before = model(x)
    adapted = get_peft_model(model, LoraConfig(target_modules=["0", "2"], r=2))
    assert torch.equal(adapted(x), before)
    assert adapted.get_nb_trainable_parameters() == (2 * (5 + 6) + 2 * (6 + 2), 2 * 11 + 2 * 8 + 36 + 14)


@pytest.mark.parametrize("architecture", LINEARS)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_new_adapter_changes_nothing(architecture, init):
    ids = torch.arange(2, 12).view(2, 5)
    model = make(architecture)
    before = model(ids).logits
    targets = [*LINEARS[architecture], EMBEDDING[architecture]]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=init))
    assert torch.equal(adapted(ids).logits, before)


def test_only_the_adapter_learns():
    model = get_peft_model(make("opt"), LoraConfig(target_modules=["q_proj"]))
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    model = get_peft_model(make("opt"), LoraConfig(target_modules=["q_proj"], bias="all"))
    trains = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trains == {name for name, _ in model.named_parameters() if name.endswith(".bias")} and trains
    model = get_peft_model(make("opt"), LoraConfig(target_modules=["q_proj"], bias="lora_only"))
    trains = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert len(trains) == 3 and all(name.endswith("q_proj.base_layer.bias") for name in trains)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_everything_that_is_to_learn_gets_a_gradient(bias):
    model = get_peft_model(make("bert"), LoraConfig(bias=bias, task_type="SEQ_CLS", init_lora_weights=False))
    model(input_ids=torch.arange(2, 12).view(2, 5), labels=torch.tensor([0, 3])).loss.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in name for name in learning)
    assert [name for name, grad in learning.items() if grad is None] == []


def test_initial_values_follow_the_paper():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(400, 300)), LoraConfig(target_modules=["0"], r=100))
    a, b = model[0].lora_A["default"].weight, model[0].lora_B["default"].weight
    bound = 400**-0.5  # Kaiming-uniform with a = √5: U(±1/√in)
    assert a.abs().max() <= bound and abs(a.std() - bound / 3**0.5) < 0.01 * bound
    assert not b.any()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"r": 0}, "r = 0"),
        ({"r": -3}, "r = -3"),
        ({"lora_alpha": -1}, "lora_alpha = -1"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"task_type": "POETRY"}, "POETRY"),
        ({"lora_alfa": 3}, "lora_alfa"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"target_parameters": ["experts"], "lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"init_lora_weights": "pizza"}, "init_lora_weights"),
    ],
)
def test_a_bad_setting_is_one_clear_error(wrong, says):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**wrong)
    assert says in str(caught.value)
    assert len(caught.value.message.splitlines()) == 1


def test_unused_settings_of_peft_are_accepted():
    config = LoraConfig(use_dora=False, loftq_config={}, layer_replication=None)
    assert config.to_dict()["use_dora"] is False
    assert LoraConfig(task_type="CAUSAL_LM").to_dict()["task_type"] == "CAUSAL_LM"
    assert LoraConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]
