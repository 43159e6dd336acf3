"""``target_parameters``: the stacked experts of Mixtral and Qwen-MoE, compared with a dense ΔW and with ``peft``."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny import shake
from helpers.tiny_architectures import build
from helpers.tiny_experts import EXPERTS, IDS, adapted, dense_twin, moe
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.lora.target_parameters import LoraParameter

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_a_dense_delta_for_every_expert(kind, implementation):
    model = adapted(kind)
    twin = dense_twin(model, moe(kind))
    for each in (model, twin):
        each.set_experts_implementation(implementation)
    answer = model(IDS).logits
    torch.testing.assert_close(answer, twin(IDS).logits, rtol=0, atol=1e-5)
    assert (answer - moe(kind)(IDS).logits).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_are_those_of_the_dense_delta(implementation):
    model, twin = adapted(), moe()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraParameter)}
    weights = {}
    for name, layer in layers.items():  # the twin's experts are W + ΔW as autograd sees it
        owner, _, parameter = name.replace(".lora_parameters", "").rpartition(".")
        module = twin.get_submodule(owner)
        weights[name] = module.get_parameter(parameter).detach() + layer.delta("default")
        del module._parameters[parameter]
        setattr(module, parameter, weights[name])
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("q_proj"):
                twin.get_submodule(name).weight += module.delta("default")
    grads = []
    for each in (model, twin):
        each.set_experts_implementation(implementation)
        each(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({f"{n} {p.shape}": p.grad.clone() for n, layer in layers.items() for p in layer.parts("default")})
        model.zero_grad()
    assert len(grads[0]) == 8 and all(grad.any() for grad in grads[0].values())
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-7, msg=name)


OPTIONS = {
    "plain": {},
    "rank and alpha of one": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r".*\.gate_up_proj": 9}},
    "rslora": {"use_rslora": True},
    "one parameter": {"target_parameters": ["experts.down_proj"]},
    "one layer": {"target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]},
    "the router": {"target_parameters": ["mlp.gate.weight", "down_proj"]},
    "no modules": {"target_modules": []},
    "whole head": {"modules_to_save": ["lm_head"]},
    "a plain linear layer": {"target_parameters": ["k_proj.weight"]},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(kind, option, tmp_path):
    chosen = EXPERTS | {"task_type": "CAUSAL_LM"} | OPTIONS[option]
    theirs = peft.get_peft_model(moe(kind), peft.LoraConfig(**chosen))
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    wanted = theirs(IDS).logits
    loaded = PeftModel.from_pretrained(moe(kind), tmp_path / "theirs")
    torch.testing.assert_close(loaded(IDS).logits, wanted, rtol=0, atol=1e-5)
    ours = get_peft_model(moe(kind), LoraConfig(**chosen))
    shake(ours)
    ours.eval().save_pretrained(tmp_path / "ours")
    answer = ours(IDS).logits
    assert (answer - moe(kind)(IDS).logits).abs().max() > 1e-3
    back = peft.PeftModel.from_pretrained(moe(kind), tmp_path / "ours")
    torch.testing.assert_close(back(IDS).logits, answer, rtol=0, atol=1e-5)
    assert torch.equal(PeftModel.from_pretrained(moe(kind), tmp_path / "ours")(IDS).logits, answer)
    saved = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: v.shape for k, v in saved[0].items()} == {k: v.shape for k, v in saved[1].items()}
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for key in ("target_parameters", "target_modules", "r", "rank_pattern", "alpha_pattern", "modules_to_save"):
        mine, true = (sorted(c[key]) if isinstance(c[key], list) else c[key] for c in configs)
        assert mine == true, key


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_what_peft_makes_of_all_linear_can_be_read(kind, tmp_path):
    theirs = peft.get_peft_model(
        moe(kind), peft.LoraConfig(r=2, target_modules="all-linear")
    )  # experts and router, too
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(moe(kind), tmp_path)
    assert {"gate_up_proj", "down_proj"} <= set(model.peft_config["default"].target_parameters)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)


def test_one_step_moves_the_experts_as_in_peft():
    moved = []
    for library, config in ((peft.get_peft_model, peft.LoraConfig), (get_peft_model, LoraConfig)):
        model = library(moe(), config(**EXPERTS))
        shaken = sorted(((n.replace("base_model.model.", ""), p) for n, p in model.named_parameters()), key=_place)
        with torch.no_grad():
            for seed, parameter in enumerate(p for n, p in shaken if ".lora_" in n):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2)
        model(input_ids=IDS, labels=IDS).loss.backward()
        moved.append([p.grad for n, p in shaken if ".lora_" in n])
    assert len(moved[0]) == len(moved[1]) == 2 * (2 + 4)
    for true, mine in zip(*moved, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


def _place(named: tuple[str, nn.Parameter]) -> tuple[str, str]:
    """Sort by layer, then in the order in which peft nests: the first parameter of the experts is innermost."""
    name = named[0].replace(".lora_parameters.gate_up_proj", ".base_layer").replace(".lora_parameters.down_proj", "")
    return name.partition(".lora_")[0], name


def test_every_verb(tmp_path):
    model = get_peft_model(moe(), LoraConfig(**EXPERTS))
    bare = moe()(IDS).logits
    torch.testing.assert_close(model(IDS).logits, bare, rtol=0, atol=0)  # a new adapter changes nothing
    shake(model)
    first = model(IDS).logits
    model.add_adapter("second", LoraConfig(target_parameters=["down_proj"], target_modules=[], r=2))  # its own set
    shake(model, "second", seed=8)
    assert torch.equal(model(IDS).logits, first)
    model.set_adapter("second")
    second = model(IDS).logits
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.save_pretrained(tmp_path / "a", selected_adapters=["second"])
    assert torch.equal(PeftModel.from_pretrained(moe(), tmp_path / "a" / "second")(IDS).logits, second)
    back = peft.PeftModel.from_pretrained(moe(), tmp_path / "a" / "second")
    torch.testing.assert_close(back(IDS).logits, second, rtol=0, atol=1e-5)
    model.set_adapter(["default", "second"])
    both = model(IDS).logits
    twin = dense_twin(model, moe())
    torch.testing.assert_close(both, twin(IDS).logits, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, bare)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, both, rtol=0, atol=1e-5)
    assert model.merge_adapter().layers == 0  # nothing is left to merge
    model.unmerge()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(model(IDS).logits, both)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, first)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, first)


def test_merged_it_is_a_plain_model_again(tmp_path):
    model = adapted("qwen3_moe")
    wanted = model(IDS).logits
    merged = model.merge_and_unload()
    assert type(merged) is tf.Qwen3MoeForCausalLM
    fresh = moe("qwen3_moe")
    assert list(merged.state_dict()) == list(fresh.state_dict())
    hooks = [m for m in merged.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert len(hooks) == len([m for m in fresh.modules() if m._forward_pre_hooks or m._forward_hooks])
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(tf.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, wanted, rtol=0, atol=1e-5)
    unloaded = adapted("qwen3_moe").unload()
    assert torch.equal(unloaded(IDS).logits, fresh(IDS).logits)


def test_gaussian_and_kaiming_starts_are_those_of_one_expert():
    torch.manual_seed(0)
    for how, spread in (("gaussian", 1 / 8), (True, 16**-0.5 / 3**0.5)):
        settings = {"target_modules": [], "target_parameters": ["gate_up_proj"], "init_lora_weights": how}
        model = get_peft_model(moe(), LoraConfig(r=8, **settings))
        a, b = model.lora_layers()[0].pair("default")
        assert a.weight.shape == (4 * 8, 16) and not b.weight.any()
        assert abs(a.weight.std() / spread - 1) < 0.1


def test_inspect_measures_experts(tmp_path):
    ranks = {"gate_up_proj": 4, "down_proj": 2}
    model = adapted(
        rank_pattern=ranks, alpha_pattern={"gate_up_proj": 7}, target_parameters=["down_proj", "gate_up_proj"]
    )
    model.save_pretrained(tmp_path)
    info = inspect_adapter(tmp_path)
    assert info["problems"] == []
    found = {layer["name"]: (layer["r"], layer["alpha"], layer["update_norm"]) for layer in info["layers"]}
    experts = "model.layers.1.mlp.experts"
    for name, parameter in ((f"{experts}.base_layer", "gate_up_proj"), (experts, "down_proj")):
        layer = model.get_submodule(f"{experts}.lora_parameters.{parameter}")
        r, alpha, norm = found[name]
        assert (r, alpha) == (layer.r["default"], layer.lora_alpha["default"])
        assert norm == pytest.approx(float(layer.delta("default").norm()), rel=1e-5)
    assert not info["readers"]["llama.cpp"]["can"]
    assert any("target_parameters" in why for why in info["readers"]["vLLM"]["why"])


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


class _Largest(TorchDispatchMode):
    """A record of the sizes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = isinstance(out, torch.Tensor) and all(
            not isinstance(a, torch.Tensor) or a.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
            for a in args
        )
        self.sizes += [out.numel()] if fresh else []
        return out


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_weight_of_an_experts_size_is_made(implementation):
    model = build(tf.AutoModelForCausalLM, "mixtral", hidden_size=128, intermediate_size=128, num_local_experts=8)
    model = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["gate_up_proj", "down_proj"], r=2))
    model.set_experts_implementation(implementation)
    ids = IDS[:1, :4]
    with _Largest() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    one_expert = 128 * 128
    assert max(seen.sizes) < one_expert
    with _Largest() as seen, torch.no_grad():
        model.merge_adapter()
    assert sorted(seen.sizes)[-1] == 8 * 2 * one_expert  # the merged weights themselves ...
    assert (
        sum(size > 2 * one_expert for size in seen.sizes) == 2 * 2
    )  # ... one for each of two parameters of two layers


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_a_half_precision_base_loses_no_small_update(implementation):
    model = moe(intermediate_size=24).to(torch.bfloat16)  # grouped products want rows of whole 16 bytes
    model = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["gate_up_proj", "down_proj"], r=2))
    model.set_experts_implementation(implementation)
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    layer = next(layer for layer in model.lora_layers() if isinstance(layer, LoraParameter))
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(2e-4)
    tiny = layer.delta("default").abs().max() / layer.base_layer.weight.abs().mean()
    assert tiny < 2**-6
    x, weight = torch.randn(5, 16, dtype=torch.bfloat16), layer.base_layer.weight[0]
    low = F.linear(x, layer.low_rank_sum(["default"])[0]).float() - F.linear(x, weight).float()
    exact = F.linear(x.float(), layer.delta("default")[0])
    assert low.any() and (low - exact).abs().max() <= 2**-8 * F.linear(x, weight).float().abs().max()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS).logits.isfinite().all()
    wanted = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, wanted, rtol=0, atol=2e-2)
