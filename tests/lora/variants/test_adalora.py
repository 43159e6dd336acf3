"""AdaLoRA against ``peft``: outputs, gradients, penalty, importance, budget and files; and its form as plain LoRA."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.tiny import make, token_ids
from lorakeet import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.errors import AdapterError, ConfigError, TargetError, TrainingError
from lorakeet.lora.variants.rank_allocator import allocate, budget
from lorakeet.peft_api.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from lorakeet.quant.quantize import quantize_
from lorakeet.train.lorafa import LoraFA

pytestmark = pytest.mark.filterwarnings("ignore")

SCHEDULE: dict[str, Any] = {"target_r": 2, "init_r": 4, "tinit": 2, "tfinal": 3, "total_step": 9, "deltaT": 2}
SHARED: dict[str, Any] = {"lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
IDS = token_ids(2, 9)
PREFIX = "base_model.model."


def adapted(model: nn.Module | None = None, **more: Any) -> PeftModel:
    torch.manual_seed(3)
    own = AdaLoraConfig(**{**SCHEDULE, **more.pop("own", {})})
    settings = {**SHARED, **more}
    return get_peft_model(make("llama") if model is None else model, LoraConfig(adalora_config=own, **settings))


def shaken(**more: Any) -> PeftModel:
    """Return a model with an adapter that changes the answers, two triplets of each layer at zero."""
    model = adapted(**more)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            if ".lora_E" in name:
                p[[0, 2]] = 0.0
    return model.eval()


def pefts(ours: PeftModel) -> Any:
    """Return peft's model with the same values."""
    theirs = peft.get_peft_model(make("llama"), peft.AdaLoraConfig(**SHARED, **SCHEDULE))
    own = {name: p for name, p in ours.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if ".lora_" in name:
                key = name.removeprefix(PREFIX)
                p.copy_(own[key if key in own else f"{key}.weight"])
    return theirs


def trained(model: Any) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by names that both packages share."""
    names = {name: name.removeprefix(PREFIX).removesuffix(".weight") for name, _ in model.named_parameters()}
    return {names[name]: p for name, p in model.named_parameters() if ".lora_" in name}


def test_outputs_gradients_and_penalty_are_those_of_peft() -> None:
    ours, theirs = shaken().train(), None
    ours.set_adapter("default")
    theirs = pefts(ours).train()
    first, second = ours(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=2e-6)  # peft adds 1e-5 to init_r
    whole = first.loss + ours.orthogonality_loss()
    torch.testing.assert_close(whole, second.loss, rtol=1e-5, atol=1e-6)
    whole.backward()
    second.loss.backward()
    gradients = {name: p.grad for name, p in trained(theirs).items()}
    assert gradients and all(p.grad is not None and p.grad.any() for p in trained(ours).values())
    for name, p in trained(ours).items():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)
    plain = get_peft_model(make("llama"), LoraConfig(**SHARED))
    assert plain.orthogonality_loss() == 0.0


def test_importance_and_budget_are_those_of_peft() -> None:
    ours = shaken()
    ours.set_adapter("default")
    theirs = pefts(ours)
    allocator = theirs.base_model.rankallocator
    layers = ours.lora_layers()
    generator = torch.Generator().manual_seed(5)
    left = []
    for step in range(1, 10):
        mine, others = trained(ours), trained(theirs)
        for name, p in mine.items():
            with torch.no_grad():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
                others[name].copy_(p)
            p.grad = torch.randn(p.shape, generator=generator)
            others[name].grad = p.grad.clone()
        ours.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        for name, p in mine.items():
            torch.testing.assert_close(p, others[name], rtol=0, atol=0)
        left.append(sum(int(p.count_nonzero()) for name, p in mine.items() if ".lora_E" in name))
        if step < 6:  # in tfinal nothing is kept
            assert (
                budget(ours.peft_config["default"].adalora_config, 24, 12, step, 9)
                == allocator.budget_schedule(step)[0]
            )
    ranks = [int(layer.part("lora_E", "default").count_nonzero()) for layer in layers]
    assert left[:2] == [24, 24] and left[-4:] == [12] * 4 and len(set(ranks)) > 1
    assert not layers[0].notes["default"].sensitivity


def test_triplets_of_equal_importance_are_counted() -> None:
    model = adapted(own={"total_step": 6})
    allocate(model.lora_layers(), "default", 3, 6)  # no gradient yet: all are equal
    kept = [layer.notes["default"].kept.sum() for layer in model.lora_layers()]
    assert sum(kept) == 2 * len(kept)


def test_files_travel_both_ways(tmp_path: Path) -> None:
    ours = shaken()
    ours.save_pretrained(tmp_path / "ours")
    expected = ours(IDS).logits
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "ours")
    assert torch.equal(again(IDS).logits, expected)
    assert again.peft_config["default"].adalora_config == AdaLoraConfig(**SCHEDULE)
    in_peft = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "ours").eval()
    assert in_peft.peft_config["default"].peft_type == "ADALORA"
    torch.testing.assert_close(in_peft(IDS).logits, expected, rtol=0, atol=1e-5)
    copied, tensors = adapted().eval(), get_peft_model_state_dict(ours)
    assert tensors.keys() == load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    assert not any(set_peft_model_state_dict(copied, tensors)) and torch.equal(copied(IDS).logits, expected)
    found = inspect_adapter(tmp_path / "ours")
    assert not found["problems"] and found["learned"] and not found["readers"]["vLLM"]["can"]
    norms = sorted(float(layer.delta("default").norm()) for layer in ours.lora_layers())
    assert sorted(layer["update_norm"] for layer in found["layers"]) == pytest.approx(norms, rel=1e-5)


def test_a_finished_adapter_of_peft_is_read_without_its_empty_triplets(tmp_path: Path) -> None:
    theirs = pefts(shaken())
    masks = [[True, False, True, False], [False] * 4, [True, True, False, True], [True] * 4] + [[True] * 4] * 2
    values = {name: p for name, p in theirs.base_model.model.named_parameters() if "lora_E" in name}
    theirs.peft_config["default"].rank_pattern = dict(zip(values, masks, strict=True))
    with torch.no_grad():
        for (_, p), mask in zip(values.items(), masks, strict=True):
            p.normal_().masked_fill_(~torch.tensor(mask)[:, None], 0.0)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits, rtol=0, atol=1e-5)
    assert [layer.r["default"] for layer in ours.lora_layers()] == [2, 1, 3, 4, 4, 4]
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["plain", "8 bits"])
def test_plain_lora_says_the_same_everywhere(base: str, tmp_path: Path) -> None:
    bare = make("llama").requires_grad_(False)
    assert base == "plain" or quantize_(bare)
    model = shaken(model=copy.deepcopy(bare))
    with torch.no_grad():
        values = [layer.part("lora_E", "default") for layer in model.lora_layers()]
        values[1].zero_()
        values[2].fill_(0.2)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path, plain_lora=True)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        settings["peft_type"] == "LORA" and settings["r"] == 2 and sorted(settings["rank_pattern"].values()) == [1, 4]
    )
    assert settings["alpha_pattern"] == settings["rank_pattern"] and "adalora_config" not in settings
    assert not any("lora_E" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)
    torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-5)
    if base == "plain":
        in_peft = peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()
        torch.testing.assert_close(in_peft(IDS).logits, expected, rtol=0, atol=1e-5)


def test_it_merges_mixes_and_goes() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), Conv1D(5, 8)), torch.randn(3, 6)
    bare = model(x)
    ours = shaken(model=copy.deepcopy(model), target_modules=["0", "1"], task_type=None, lora_dropout=0.2)
    alone = ours(x)
    assert (alone - bare).abs().max() > 0.1
    ours.add_adapter("plain", LoraConfig(r=2, target_modules=["0"]))
    torch.testing.assert_close(ours(x, adapter_names=["default", "__base__", "plain"])[0], alone[0])
    report = ours.merge_adapter()
    assert report.effect > 0.1
    torch.testing.assert_close(ours(x), alone)
    ours.unmerge()
    torch.testing.assert_close(ours.unload()(x), bare, rtol=0, atol=0)


def test_what_it_cannot_do_is_refused() -> None:
    for settings, message in (
        ({"use_rslora": True}, "adalora_config with use_rslora"),
        ({"alpha_pattern": {"q_proj": 3}}, "adalora_config with alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', expected true or false"),
        ({"use_dora": True}, "the settings choose DoRA and AdaLoRA"),
        ({"rank_pattern": {"q_proj": 5}}, "a rank above adalora_config.init_r=4"),
        ({"r": 16}, "r=16 is set beside adalora_config.init_r=4"),
        ({"own": {"target_r": 5}}, "target_r=5 is above init_r=4"),
        ({"own": {"tfinal": 7}}, "leave none of 9 steps for the choice of ranks"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapted(**settings)
    with pytest.raises(ConfigError, match="adalora_config: unknown setting 'targets'"):
        LoraConfig(adalora_config={"targets": 3})
    with pytest.raises(TargetError, match="is a Embedding, which AdaLoRA cannot adapt"):
        adapted(target_modules=["embed_tokens"])
    with pytest.raises(TrainingError, match="LoRA-FA got a AdaLoRA adapter"):
        LoraFA(adapted())
    with pytest.raises(AdapterError, match="is a AdaLoRA adapter, which cannot be combined"):
        shaken().add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(AdapterError, match="no AdaLoRA adapter"):
        get_peft_model(make("llama"), LoraConfig(**SHARED)).update_and_allocate(1)
    with pytest.raises(ConfigError, match="total_step"):
        adapted(own={"total_step": None}).update_and_allocate(1)
    with pytest.raises(ConfigError, match="'LOHA', expected one of LORA, ADALORA, VERA"):
        LoraConfig.from_dict({"peft_type": "LOHA"})
    with pytest.raises(ConfigError, match="expected a list of true and false"):
        LoraConfig.from_dict({"peft_type": "ADALORA", "rank_pattern": {"a.lora_E": 3}})
