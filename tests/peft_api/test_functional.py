"""PEFT's functions on a model without the methods of ``PeftModel``."""

from __future__ import annotations

import pytest
import torch

import lorakeet
from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig
from lorakeet.errors import AdapterError


def test_functions_do_what_the_methods_do(tmp_path):
    model = lorakeet.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), make("llama").half())
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False)
    lorakeet.cast_adapter_dtype(model, "other")
    assert {parameter.dtype for parameter in model.adapter_parameters("other")} == {torch.float32}
    lorakeet.set_adapter(model, "other")
    assert model.active_adapter == "other" and model.trains("other")
    lorakeet.set_requires_grad(model, "other", False)
    assert not model.trains("other")
    assert lorakeet.delete_adapter(model, "other") == ["default"] and list(model.peft_config) == ["default"]
    with pytest.raises(AdapterError, match="no adapter"):
        lorakeet.set_adapter(make("llama"), "default")


def test_scales_change_inside_a_block_only(tmp_path):
    model = lorakeet.get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"]))
    shake(model)
    before, bare = model(token_ids()).logits, make("llama")(token_ids()).logits
    with lorakeet.rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(model(token_ids()).logits, bare)
    assert torch.equal(model(token_ids()).logits, before)
    model.save_pretrained(tmp_path)
    assert lorakeet.check_if_peft_model(tmp_path) and not lorakeet.check_if_peft_model(tmp_path / "none")
    tensors = lorakeet.load_peft_weights(tmp_path, device="cpu")
    assert tensors.keys() == lorakeet.get_peft_model_state_dict(model).keys()
    for value in ("2", None):
        with pytest.raises(AdapterError, match="expected a number"), lorakeet.rescale_adapter_scale(model, value):
            pass
