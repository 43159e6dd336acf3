"""Code written for ``peft`` meets its names here: each row is a habit, held against ``peft`` where that has a value."""

import copy
import dataclasses
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakeet
from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError, MergeError
from lorakeet.peft_api.other_names import PeftWarning


def adapted(**settings):
    model = get_peft_model(make("llama"), LoraConfig(**settings))
    shake(model)
    return model


@pytest.mark.parametrize("name", sorted(lorakeet._MODULES))
def test_each_public_name_can_be_imported(name):
    assert getattr(lorakeet, name) is not None


def test_paths_to_the_base():
    model = adapted()
    view = model.base_model
    assert view.model is model
    assert isinstance(view, type(model.model)) and view.layers is model.model.layers
    assert model.model.model is model.model
    assert view.prefix == "lora_" and view.active_adapters == ["default"] and view.lm_head is model.lm_head
    view.set_adapter("default")
    assert torch.equal(copy.deepcopy(model)(token_ids()).logits, model(token_ids()).logits)


def test_small_attributes():
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    model = get_peft_model(make("llama"), config)
    assert model.active_peft_config is config and model.peft_config["default"] is config
    assert config.peft_type == lorakeet.PeftType.LORA and config.peft_type.value == "LORA"
    assert not config.is_prompt_learning and config.use_dora is False
    assert isinstance(model, lorakeet.PeftModelForCausalLM) and not isinstance(model, lorakeet.PeftModelForSeq2SeqLM)
    assert dataclasses.replace(config, r=2).r == 2 and dataclasses.asdict(config)["r"] == 4
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - {
        f.name for f in dataclasses.fields(config)
    } <= {"runtime_config"}


def test_settings_changed_later_do_not_reach_the_file(tmp_path):
    model = adapted(r=4)
    model.peft_config["default"].lora_alpha = 99
    with pytest.warns(UserWarning, match="lora_alpha changed after"):
        model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).lora_alpha == 8


def test_layer_attributes_and_verbs():
    layer = adapted(r=4, lora_dropout=0.1).model.layers[0].self_attn.q_proj
    assert isinstance(layer, lorakeet.LoraLayer) and repr(layer).startswith("lora.Linear(")
    assert (layer.in_features, layer.out_features) == (layer.base_layer.in_features, layer.base_layer.out_features)
    assert layer.lora_dropout["default"].p == 0.1 and layer.use_rslora == {"default": False}
    assert torch.equal(layer.get_delta_weight("default"), layer.delta("default"))
    before = layer.scaling["default"]
    layer.scale_layer(2.0)
    assert layer.scaling["default"] == 2 * before
    layer.unscale_layer()
    layer.set_scale("default", 3.0)
    assert layer.scaling["default"] == 3 * before
    layer.unscale_layer()
    layer.merge()
    assert layer.merged and layer.merged_adapters == ["default"]
    layer.unmerge()
    assert not layer.merged


def test_the_view_of_a_model_whose_own_part_is_called_model_runs_the_model():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.model(x))

    model = get_peft_model(Wrapped(), LoraConfig(target_modules=["head"]))
    x = torch.randn(2, 4)
    assert torch.equal(model.base_model(x), model(x)) and torch.equal(model.base_model.forward(x), model(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_trained_bias_without_a_bias_of_the_base_warns_as_in_peft(bias):
    layer = nn.Sequential(nn.Linear(4, 4, bias=bias))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(layer, LoraConfig(target_modules=["0"], lora_bias=True))
    told = [w for w in caught if issubclass(w.category, PeftWarning) and "type Linear has no bias" in str(w.message)]
    assert bool(told) != bias


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_layer_does_not_merge_what_is_not_finite(part):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], lora_bias=True))
    before = [tensor.clone() for tensor in model[0].base_layer.parameters()]
    with torch.no_grad():
        getattr(model[0].lora_B["default"], part).fill_(float("inf"))
    with pytest.raises(MergeError, match="NaNs detected"):
        model[0].merge()
    assert not model[0].merged and all(map(torch.equal, before, model[0].base_layer.parameters()))


def test_tables_of_a_layer_follow_its_adapters():
    model = adapted(r=2, use_dora=True)
    layer = model.model.layers[0].self_attn.q_proj
    tables = [layer.use_dora, layer.lora_bias, layer.lora_variant, layer.r]
    assert all("default" in table for table in tables) and layer.use_dora == {"default": True}
    model.delete_adapter("default")
    assert not any("default" in table for table in tables)


def test_one_layer_is_switched_and_the_model_joins_it_again():
    model = adapted()
    with_adapter, layer = model(token_ids()).logits, model.model.layers[0].self_attn.q_proj
    layer.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    assert not torch.equal(model(token_ids()).logits, with_adapter)
    model.enable_adapter_layers()
    assert torch.equal(model(token_ids()).logits, with_adapter)
    model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    with model.disable_adapter():
        bare = model(token_ids()).logits
    assert torch.equal(model(token_ids()).logits, bare)


def test_status_as_in_peft():
    ours = adapted(r=4).get_model_status()
    theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4)).get_model_status()
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)


def test_state_dicts_travel_between_both():
    ours = adapted(r=4)
    theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4))
    tensors = lorakeet.get_peft_model_state_dict(ours)
    assert tensors.keys() == peft.get_peft_model_state_dict(theirs).keys()
    peft.set_peft_model_state_dict(theirs, tensors)
    again = get_peft_model(make("llama"), LoraConfig(r=4))
    assert lorakeet.set_peft_model_state_dict(again, tensors) == ([], [])
    expected = ours(token_ids()).logits
    assert torch.equal(again(token_ids()).logits, expected)
    torch.testing.assert_close(theirs(token_ids()).logits, expected)
    base = make("llama").state_dict()
    assert lorakeet.get_base_model_state_dict(ours).keys() == base.keys()
    assert lorakeet.set_base_model_state_dict(ours, base) == ([], [])


def test_a_state_dict_that_does_not_fit_is_told():
    model, tensors = adapted(r=4), lorakeet.get_peft_model_state_dict(adapted(r=4))
    first = next(iter(tensors))
    with pytest.warns(UserWarning, match="1 missing"):
        assert lorakeet.set_peft_model_state_dict(model, {k: v for k, v in tensors.items() if k != first})[0] == [first]
    with pytest.raises(AdapterError, match="wrong shapes"):
        lorakeet.set_peft_model_state_dict(model, {**tensors, first: torch.ones(1, 1)})


def test_injection_keeps_the_names_of_the_layers():
    model = lorakeet.inject_adapter_in_model(LoraConfig(r=4), make("llama"), low_cpu_mem_usage=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    tensors = lorakeet.get_peft_model_state_dict(adapted(r=4))
    lorakeet.set_peft_model_state_dict(model, tensors)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert next(iter(lorakeet.get_peft_model_state_dict(model))).startswith("model.layers.0.")


def test_load_time_arguments(tmp_path):
    adapted(r=4).save_pretrained(tmp_path)
    options = {"device_map": "auto", "torch_dtype": torch.float32, "token": None, "cache_dir": None}
    model = PeftModel.from_pretrained(make("llama").half(), tmp_path, autocast_adapter_dtype=False, **options)
    assert {parameter.dtype for parameter in model.adapter_parameters("default")} == {torch.float16}


def test_an_auto_class_opens_the_base_that_the_adapter_names(tmp_path):
    base = make("llama")
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="paths in an adapter are not followed"):
        lorakeet.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    opened = lorakeet.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", allow_local_base=True).eval()
    assert torch.equal(opened(token_ids()).logits, model.eval()(token_ids()).logits)
    with pytest.raises(AdapterError, match="CAUSAL_LM"):
        lorakeet.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


def test_a_warning_is_printed_once_and_can_be_recorded(capsys):
    from lorakeet.log import warn

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(lorakeet.LorakeetWarning):
            warn("a problem")
    with pytest.warns(RuntimeWarning, match="a problem"):
        warn("a problem")


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x)[0]


def test_an_attention_answers_as_in_peft(tmp_path):
    torch.manual_seed(0)
    base, x = Attentive(), torch.randn(2, 5, 8)
    settings = {"r": 4, "target_modules": ["mha"], "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    expected = theirs(x).detach()
    torch.testing.assert_close(ours(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected)
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert {(layer.in_features, layer.out_features) for layer in ours.lora_layers()} == {(8, 24), (8, 8)}
    with ours.disable_adapter():
        torch.testing.assert_close(ours(x), base(x))
    torch.testing.assert_close(ours.merge_and_unload()(x), expected)


def test_an_attention_learns_in_both_places():
    model = get_peft_model(Attentive(), LoraConfig(r=4, target_modules=["mha"], init_lora_weights=False))
    model(torch.randn(2, 5, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.adapter_parameters("default"))
