"""Methods that change adapters: names, merged and disabled models, and all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from helpers.tiny import make, shake, token_ids
from helpers.tiny_training import tiny_llama
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError, LorakeetError, TargetError
from lorakeet.lora.linear import LoraLinear

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def two(merged: bool = False) -> PeftModel:
    model = get_peft_model(make("llama"), LoraConfig(**SETTINGS))
    model.add_adapter("other", LoraConfig(**SETTINGS))
    shake(model)
    shake(model, "other", seed=4)
    if merged:
        model.merge_adapter()
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(token_ids()).logits


def answer(name: str | None) -> Tensor:
    """Return what a model answers with one adapter of :func:`two` alone, or with none."""
    model = two()
    if name is None:
        return logits(make("llama"))
    model.set_adapter(name)
    return logits(model)


# -- merged -----------------------------------------------------------------------------------------------------------


def test_a_merged_adapter_is_not_deleted_and_another_one_is() -> None:
    model = two(merged=True)
    with pytest.raises(AdapterError, match="while they are merged"):
        model.delete_adapter("default")
    assert all("default" in layer.r for layer in model.lora_layers())
    model.delete_adapter("other")
    assert all(layer.merged_adapters == ["default"] for layer in model.lora_layers())
    model.unmerge()
    assert torch.equal(logits(model), answer("default"))


@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_merges_the_adapters_that_it_has_chosen_itself(whole: bool) -> None:
    model = two()
    for layer in model.lora_layers() if whole else model.lora_layers()[:2]:
        layer.set_adapter(["other", "default"])
    model.lora_layers()[-1].enable_adapters(False)
    expected = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.unmerge()
    assert torch.equal(logits(model), expected)
    model.merge_adapter(["other"])  # named: the same in all layers
    assert torch.allclose(logits(model), answer("other"), atol=1e-5)


def test_switching_a_merged_model_unmerges_it_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = two(merged=True)
    model.set_adapter("other")
    assert "adapter default is unmerged first" in caplog.text
    assert torch.equal(logits(model), answer("other"))


def test_a_merged_model_is_disabled_saved_and_extended_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = two(merged=True)
    want = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), answer(None))
    model.add_adapter("third", LoraConfig(r=2, target_modules=["down_proj"]))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), want)
    assert {name for layer in model.lora_layers() for name in layer.merged_adapters} == {"default"}
    assert "unmerged" not in caplog.text
    assert torch.equal(logits(PeftModel.from_pretrained(make("llama"), tmp_path)), answer("default"))


def test_what_is_activated_while_disabled_acts_afterwards() -> None:
    model = two(merged=True)
    with model.disable_adapter():
        model.set_adapter("other")
        assert torch.equal(logits(model), answer(None))
    assert torch.equal(logits(model), answer("other"))


@pytest.mark.parametrize("settings", [SETTINGS, {"r": 2, "target_modules": ["embed_tokens"]}])
def test_training_a_merged_adapter_says_why_it_cannot(settings: dict[str, Any]) -> None:
    model = get_peft_model(make("llama"), LoraConfig(**settings))
    shake(model)
    model.merge_adapter()
    loss = model.train()(input_ids=token_ids(), labels=token_ids()).loss
    with pytest.raises(AdapterError, match="training it would change nothing"):
        loss.backward()
    model.unmerge()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()


# -- all or nothing ---------------------------------------------------------------------------------------------------


def shape_of(model: nn.Module) -> list[Any]:
    """Return the classes, parameters, hooks and flags of a model, to compare."""
    modules = [(type(module), module.training, len(module._forward_hooks)) for module in model.modules()]
    return [*modules, *((name, id(p), p.requires_grad) for name, p in model.named_parameters())]


@pytest.mark.parametrize("name", ["training", "_modules", "_keys", "weight", "forward", "a.b", "a/b", "", 3])
def test_a_refused_name_leaves_the_model_alone(name: Any) -> None:
    model = make("llama")
    before = shape_of(model)
    with pytest.raises(AdapterError, match="cannot be named"):
        get_peft_model(model, LoraConfig(**SETTINGS), adapter_name=name)
    assert shape_of(model) == before
    model = get_peft_model(model, LoraConfig(**SETTINGS))
    before = shape_of(model)
    with pytest.raises(AdapterError, match="cannot be named"):
        model.add_adapter(name, LoraConfig(**SETTINGS))
    assert shape_of(model) == before


@pytest.mark.parametrize("first", [True, False])
def test_a_failure_halfway_leaves_the_model_as_it_was(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make("llama") if first else two()
    before, want = shape_of(model), logits(model)
    made: list[str] = []
    honest = LoraLinear.make

    def fail_at_the_third(self: LoraLinear, adapter: str, config: Any, r: int) -> None:
        made.append(adapter)
        if len(made) == 3:
            raise KeyboardInterrupt
        honest(self, adapter, config, r)

    monkeypatch.setattr(LoraLinear, "make", fail_at_the_third)
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, settings) if first else model.add_adapter("new", settings)
    assert shape_of(model) == before
    assert torch.equal(logits(model), want)


def test_a_layer_whose_adapters_are_deleted_may_be_adapted_in_another_way() -> None:
    model = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    model.delete_adapter("default")
    model.add_adapter("embedding", LoraConfig(target_modules=["embed_tokens"]))
    model.set_adapter("embedding")
    assert model.trains("embedding")


@pytest.mark.parametrize("names", [[], ["default", "nobody"]])
def test_names_that_do_not_exist_change_nothing(names: list[str]) -> None:
    model = two()
    before = shape_of(model)
    with pytest.raises(AdapterError):
        model.set_adapter(names)
    assert shape_of(model) == before and model.active_adapters == ["default"]


def test_an_adapter_named_twice_acts_once() -> None:
    model = two()
    model.set_adapter(["other", "other"])
    assert torch.equal(logits(model), answer("other"))


# -- modules trained whole ----------------------------------------------------------------------------------------------


def test_modules_to_save_means_the_modules_of_peft(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    ours = get_peft_model(make("llama"), LoraConfig(**settings))
    theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(**settings))
    for name, model in (("ours", ours), ("theirs", theirs)):
        shake(model)
        model.save_pretrained(tmp_path / name)
    assert torch.allclose(
        logits(PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")), logits(theirs), atol=1e-5
    )
    loaded = peft.PeftModel.from_pretrained(make("llama"), str(tmp_path / "ours"))
    assert torch.allclose(logits(loaded), logits(ours), atol=1e-5)


def test_two_copies_of_one_module_do_not_act_together() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("c", LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    with pytest.raises(AdapterError, match="Only one adapter can be set at a time.*each has its own copy of a Linear"):
        model.set_adapter(["a", "b"])
    with pytest.raises(LorakeetError, match="Only one adapter can be set at a time.*each has its own copy of a Linear"):
        model.merge_and_unload(adapter_names=["a", "b"])
    model.set_adapter(["a", "c"])


@pytest.mark.parametrize(
    ("keys", "targets", "reason"),
    [
        (["layers"], ["lm_head"], "is never called itself.*type ModuleList"),
        (["lp"], ["down_proj"], "would be trained whole and adapted"),
        (["proj"], ["q_proj"], "would be trained whole and adapted"),
        (["nrm"], ["q_proj"], "not in this model"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_refused(keys: list[str], targets: list[str], reason: str) -> None:
    model = tiny_llama()
    before = shape_of(model)
    with pytest.raises(TargetError, match=reason):
        get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=keys))
    assert shape_of(model) == before


def test_a_module_that_another_adapter_adapts_is_not_trained_whole() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(TargetError, match="is adapted by another adapter"):
        model.add_adapter("whole", LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))


def test_a_module_inside_another_is_trained_with_it() -> None:
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp", "down_proj"])
    model = get_peft_model(tiny_llama(), settings)
    assert all("down_proj.modules_to_save" not in name for name, _ in model.named_parameters())
