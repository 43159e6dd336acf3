"""A prepared base is frozen, its norms and head are fp32, and gradients reach the adapters."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

from helpers.tiny import ARCHITECTURES, LINEARS, make, token_ids
from lorakeet.base.kbit import prepare_model_for_kbit_training
from lorakeet.errors import BaseModelError

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "norm" in type(module).__name__.lower()]


def hooks(model: nn.Module) -> int:
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)


def probe_gradient(name: str, model: nn.Module) -> torch.Tensor:
    """Return the gradient of a sum of squared logits with respect to a trainable weight of the first layer."""
    weight = next(p for n, p in model.named_parameters() if LINEARS[name][0] in n and n.endswith("weight"))
    weight.requires_grad_(True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    output = model(input_ids=token_ids())
    assert output.logits.dtype == torch.float32
    output.logits.square().mean().backward()
    assert weight.grad is not None
    return weight.grad.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_like_the_fp32_model(name: str, dtype: torch.dtype) -> None:
    expected = probe_gradient(name, make(name))
    model = prepare_model_for_kbit_training(make(name).to(dtype))
    actual = probe_gradient(name, model)
    error = (actual - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_fp32_and_what_stays_half(name: str) -> None:
    model = make(name).bfloat16()
    before = dict(model.named_parameters())
    assert prepare_model_for_kbit_training(model) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert norms(model)
    in_norms = {id(parameter) for norm in norms(model) for parameter in norm.parameters()}
    for key, parameter in model.named_parameters():
        assert parameter is before[key]
        assert parameter.dtype == (torch.float32 if id(parameter) in in_norms else torch.bfloat16), key
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_twice_does_no_harm(name: str) -> None:
    once = prepare_model_for_kbit_training(make(name).bfloat16())
    count, expected = hooks(once), once(input_ids=token_ids()).logits
    twice = prepare_model_for_kbit_training(once)
    assert hooks(twice) == count
    assert torch.equal(twice(input_ids=token_ids()).logits, expected)


@pytest.mark.parametrize(("name", "argument"), [("opt", "input"), ("llama", "hidden_states")])
def test_a_norm_computes_in_fp32_and_answers_as_asked(name: str, argument: str) -> None:
    norm = norms(prepare_model_for_kbit_training(make(name).bfloat16()))[0]
    x = torch.randn(30, 32).bfloat16()
    exact = norm.forward(x.float())  # forward itself runs no hooks
    assert exact.dtype == norm(x.float()).dtype == torch.float32
    assert torch.equal(norm(x), exact.bfloat16()) and norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(**{argument: x}), exact.bfloat16())


def test_inputs_require_gradients_only_with_checkpointing() -> None:
    ids = token_ids()
    plain = prepare_model_for_kbit_training(make("llama"), use_gradient_checkpointing=False)
    assert not plain.get_input_embeddings()(ids).requires_grad and not plain.is_gradient_checkpointing
    prepared = prepare_model_for_kbit_training(make("llama"))
    assert prepared.get_input_embeddings()(ids).requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_kind_of_checkpointing_is_passed_on(reentrant: bool) -> None:
    expected = probe_gradient("llama", make("llama"))
    model = prepare_model_for_kbit_training(make("llama"), True, {"use_reentrant": reentrant})
    layer = model.model.layers[0]
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant
    assert torch.allclose(probe_gradient("llama", model), expected, atol=1e-6)


def test_the_default_is_not_reentrant() -> None:
    model = prepare_model_for_kbit_training(make("gpt2"))
    assert model.transformer.h[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}


def test_no_checkpointing_in_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(BaseModelError, match="no gradient checkpointing"):
        prepare_model_for_kbit_training(model)


def test_a_prepared_model_can_be_copied_and_pickled() -> None:
    model = prepare_model_for_kbit_training(make("llama").bfloat16(), use_gradient_checkpointing=False)
    expected = model(input_ids=token_ids()).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=token_ids()).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=token_ids()).logits, expected)


def test_generates_as_before_in_fp32() -> None:
    model, ids = make("llama"), token_ids()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    assert torch.equal(prepare_model_for_kbit_training(model).generate(ids, **options), expected)


def test_the_signature_is_the_fields() -> None:
    import inspect

    ours = inspect.signature(prepare_model_for_kbit_training).parameters
    theirs = inspect.signature(peft.prepare_model_for_kbit_training).parameters
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
