"""Lorakeet's objects pass for ``peft``'s in ``isinstance``, and for nothing else."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig, PeftConfig, PeftModel, get_peft_model

SETTINGS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def model() -> PeftModel:
    adapted = get_peft_model(make("llama"), LoraConfig(**SETTINGS))
    shake(adapted)
    return adapted


def test_isinstance_is_true_for_pefts_classes(model: PeftModel) -> None:
    layer, config = model.lora_layers()[0], model.peft_config["default"]
    for value, classes in {
        model: (peft.PeftModel, nn.Module, PeftModel),
        layer: (BaseTunerLayer, nn.Module),
    }.items():
        assert all(isinstance(value, kind) for kind in classes)
    assert isinstance(config, peft.LoraConfig) and isinstance(config, peft.PeftConfig)
    assert isinstance(PeftConfig(), peft.PeftConfig) and not isinstance(PeftConfig(), peft.LoraConfig)
    assert not isinstance(make("llama"), peft.PeftModel) and not isinstance(model, peft.PeftMixedModel)
    model.unload()
    assert not isinstance(model, peft.PeftModel)


def test_attributes_stay_lorakeets(model: PeftModel) -> None:
    assert type(model).__mro__[1] is PeftModel and peft.PeftModel not in type(model).__mro__
    assert model.__class__.__name__ == "LlamaForCausalLM"
    assert model.__class__.forward is type(model).forward
    foreign = set(vars(peft.PeftModel)) - set(dir(type(model))) - set(dir(model))
    assert foreign and not any(hasattr(model, name) for name in foreign)


def test_copies_are_of_the_same_type(model: PeftModel) -> None:
    for value in (model, model.lora_layers()[0], model.peft_config["default"]):
        for twin in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert type(twin) is type(value)
    config = LoraConfig(**SETTINGS)
    assert type(dataclasses.replace(config, r=4)) is LoraConfig
    assert config == copy.deepcopy(config) and config.__class__(**SETTINGS) == config.__class__(**SETTINGS)


def test_a_class_built_on_the_answer_is_built_on_the_own_class(model: PeftModel) -> None:
    """FSDP and parametrizations make a subclass of ``__class__`` and assign it."""
    layer = model.lora_layers()[0]
    parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
    before = model(token_ids()).logits
    model.__class__ = type("Further", (model.__class__,), {"further": True})
    assert model.further and type(model).__mro__[2] is PeftModel and peft.PeftModel not in type(model).__mro__
    assert isinstance(model, peft.PeftModel) and model.active_adapters == ["default"]
    assert torch.equal(model(token_ids()).logits, before)


def test_functions_of_peft_make_lorakeets_models_from_lorakeets_configurations() -> None:
    for settings in (SETTINGS, {**SETTINGS, "task_type": None}):
        assert isinstance(peft.get_peft_model(make("llama"), LoraConfig(**settings), "mine"), PeftModel)
        theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(**settings))
        assert not isinstance(theirs, PeftModel) and isinstance(theirs, peft.PeftModel)
    injected = peft.inject_adapter_in_model(LoraConfig(**SETTINGS), make("llama"), "mine")
    assert isinstance(injected, PeftModel) and injected.active_adapters == ["mine"]
    assert not isinstance(peft.inject_adapter_in_model(peft.LoraConfig(**SETTINGS), make("llama")), PeftModel)


def test_add_adapter_of_transformers_takes_both_configurations() -> None:
    ours, theirs = make("llama"), make("llama")
    ours.add_adapter(LoraConfig(**SETTINGS), "mine")
    theirs.add_adapter(peft.LoraConfig(**SETTINGS))
    assert isinstance(ours, PeftModel) and ours.active_adapters == ["mine"]
    assert not isinstance(theirs, PeftModel) and theirs.active_adapters() == ["default"]
