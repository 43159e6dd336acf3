"""Initializations by name: equations, the whole base where the adapter does not act, files; held against ``peft``."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.tiny import make, token_ids
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import ConfigError, TargetError
from lorakeet.lora.initialization.taken_part import taken_parts
from lorakeet.quant.quantize import quantize_

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.arange(10).repeat(3, 1)
#: Settings of α and of single layers, which change s.
SCALES = ({}, {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"last": 2}, "alpha_pattern": {"linear": 7}})


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.linear, self.turned, self.last = nn.Linear(16, 12), Conv1D(8, 12), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.turned(torch.tanh(self.linear(self.embed(x))))))


@pytest.fixture(scope="module")
def base() -> Small:
    torch.manual_seed(0)
    return Small()


def adapted(base: nn.Module, how: str | bool, library=None, **settings):
    """Return a copy of the base with an adapter, by Lorakeet or by another library of its names."""
    targets = settings.pop("target_modules", ["linear", "turned", "last"])
    config = (library.LoraConfig if library else LoraConfig)(
        r=4, target_modules=targets, init_lora_weights=how, **settings
    )
    return (library.get_peft_model if library else get_peft_model)(copy.deepcopy(base), config)


@torch.no_grad()
def learn(model: nn.Module) -> torch.Tensor:
    """Change every B, as a training would, and return the answers then."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.mul_(1.5).add_(0.01)
    return model(X)


@pytest.mark.parametrize("settings", SCALES, ids=["plain", "rslora"])
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_8", "olora", "orthogonal"])
def test_a_new_adapter_answers_as_its_base_and_gives_back_what_it_took(base, how, settings) -> None:
    model, expected = adapted(base, how, **settings), base(X)
    torch.testing.assert_close(model(X), expected)
    assert bool(taken_parts(model.linear)) == (how != "orthogonal")
    out = learn(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), expected)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    model.set_adapter("other")
    alone = adapted(base, True, target_modules=["linear"])
    alone.linear.lora_A.default.weight = model.linear.lora_A.other.weight
    alone.linear.lora_B.default.weight = model.linear.lora_B.other.weight
    alone.linear.scaling["default"] = model.linear.scaling["other"]
    torch.testing.assert_close(model(X), alone(X))
    if how != "orthogonal":
        rows = model.eval()(X, adapter_names=["default", "other", "__base__"])
        torch.testing.assert_close(rows, torch.stack([out[0], alone(X)[1], expected[2]]))
    model.merge_adapter(["default"])
    model.delete_adapter("other")
    torch.testing.assert_close(model(X), out)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), out)
    whole = model.unload()
    torch.testing.assert_close(whole(X), expected)
    torch.testing.assert_close(whole.state_dict(), base.state_dict())


@pytest.mark.parametrize("settings", SCALES, ids=["plain", "rslora"])
@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_it_equals_peft(base, how, settings) -> None:
    targets = ["linear", "last"] if how == "olora" else ["linear", "turned", "last"]  # peft's OLoRA fails on Conv1D
    torch.manual_seed(1)
    ours = adapted(base, how, target_modules=targets, **settings)
    torch.manual_seed(1)
    theirs = adapted(base, how, peft, target_modules=targets, **settings)
    for name in targets:
        one, other = getattr(ours, name), getattr(theirs.base_model.model, name)
        torch.testing.assert_close(one.base_layer.weight, other.base_layer.weight, atol=1e-5, rtol=0)
        if how != "orthogonal":  # whose random numbers peft draws after others
            torch.testing.assert_close(one.delta("default"), other.get_delta_weight("default"), atol=1e-5, rtol=0)
            for table in ("lora_A", "lora_B"):
                pair = [getattr(layer, table)["default"].weight.abs() for layer in (one, other)]
                torch.testing.assert_close(*pair, atol=1e-5, rtol=0)
    if how != "orthogonal":
        out = [model(X) for model in (ours, theirs)]
        gradients = [torch.autograd.grad(h.square().sum(), p) for h, p in zip(out, _trained(ours, theirs), strict=True)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one.abs(), other.abs(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.merge_and_unload()(X), theirs.merge_and_unload()(X))


def _trained(*models: nn.Module) -> list[list[nn.Parameter]]:
    return [[p for p in model.parameters() if p.requires_grad] for model in models]


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_files_travel_as_they_are_and_as_plain_lora(base, how, tmp_path: Path) -> None:
    settings = {"target_modules": ["linear", "last", "embed"]}
    model = adapted(base, how, **settings)
    model.peft_config["default"].init_lora_weights = True  # as peft's recipe has it
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = how
    out = learn(model)
    model.save_pretrained(tmp_path / "same")
    model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=tmp_path / "initial")
    model.save_pretrained(tmp_path / "plain", plain_lora=True)
    torch.testing.assert_close(model(X), out)
    for name, rank in (("same", 4), ("peft", 8), ("plain", 8)):
        for library in (PeftModel, peft.PeftModel):
            loaded = library.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
            torch.testing.assert_close(loaded(X), out)
            assert loaded.peft_config["default"].r == rank
    theirs = adapted(base, how, peft, **settings)
    expected = learn(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")(X), expected)
    with pytest.warns(UserWarning, match="its answers will be wrong"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "initial")


def test_a_fast_svd_is_near_the_exact_one_and_the_same_when_loaded(base, tmp_path: Path) -> None:
    exact, fast = adapted(base, "pissa").linear, adapted(base, "pissa_niter_16")
    left = [(base.linear.weight - layer.delta("default")).norm() for layer in (exact, fast.linear)]
    torch.testing.assert_close(*left, atol=0, rtol=1e-3)
    out = learn(fast)
    fast.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(X), out)
    theirs = adapted(base, "pissa_niter_2", peft)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="another tool"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")


@pytest.mark.parametrize("store", ["int8", "bf16", "fp64"])
def test_the_rest_of_the_weight_is_stored_as_the_base_is(store, caplog) -> None:
    model = make("llama")
    if store == "int8":
        assert quantize_(model.requires_grad_(False))
    else:
        model = model.to(torch.bfloat16 if store == "bf16" else torch.float64)
    ids = token_ids()
    expected, dtype = model(ids).logits.float(), model.model.layers[0].self_attn.q_proj.weight.dtype
    limit = {"int8": 0.1, "bf16": 0.05, "fp64": 1e-6}[store] * expected.abs().max()
    with caplog.at_level("INFO", "lorakeet"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"))
    assert ("rounded again" in caplog.text) == (store == "int8")
    assert model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == dtype
    assert (model(ids).logits.float() - expected).abs().max() < limit
    assert (model.unload()(ids).logits.float() - expected).abs().max() < limit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pizza"}, "expected true, false, or one of"),
        ({"init_lora_weights": "pissa_niter_"}, "expected true, false, or one of"),
        ({"init_lora_weights": "pissa", "r": 13}, "'linear' has a weight of rank 12 at most"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even one"),
        ({"init_lora_weights": "olora", "target_modules": ["conv"]}, "is for linear layers"),
        ({"init_lora_weights": "olora", "target_parameters": ["linear.weight"]}, "is for linear layers"),
        ({"init_lora_weights": "gaussian", "lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed"], "lora_bias": True}, "lora_bias=True is not supported for Embedding"),
    ],
)
def test_what_cannot_begin_so_is_refused_before_anything_changes(base, settings, message) -> None:
    model = copy.deepcopy(base)
    model.conv = nn.Conv1d(2, 2, 1)
    with pytest.raises((ConfigError, TargetError), match=message):
        targets = None if "target_parameters" in settings else ["linear"]
        get_peft_model(model, LoraConfig(**{"target_modules": targets, **settings}))
    assert type(model) is Small and type(model.linear) is nn.Linear


def test_mica_trains_a_alone_from_the_minor_directions_as_peft_does(base, tmp_path: Path) -> None:
    targets = ["embed", "linear", "turned", "last"]
    ours, theirs = adapted(base, "mica", target_modules=targets), adapted(base, "mica", peft, target_modules=targets)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained and all("_A" in name for name in trained)
    assert trained == {n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad}
    for name in targets:
        layer, other = getattr(ours, name), getattr(theirs.base_model.model, name)
        expected = other.lora_embedding_B.default if name == "embed" else other.lora_B.default.weight
        torch.testing.assert_close(layer.matrices("default")[1], expected)
    torch.testing.assert_close(ours(X), base(X))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in trained:
                parameter.normal_()
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained
    torch.testing.assert_close(again(X), ours(X))
    ours.delete_adapter("default")
    ours.add_adapter("default", LoraConfig(r=2, target_modules=["linear"]))
    ours.set_adapter("default")
    assert ours.linear.lora_B.default.weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"use_dora": True}, "plain LoRA"), ({"r": 9, "target_modules": ["turned"]}, "9 directions")],
)
def test_mica_is_refused_where_it_means_nothing(base, settings, reason) -> None:
    with pytest.raises((ConfigError, TargetError), match=reason):
        get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights="mica", **settings))
