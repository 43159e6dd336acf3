"""Fused norms, gated networks and rotary embeddings equal the model's own modules and keep fewer bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from helpers.small_models import KINDS, adapted, assert_same, outcome, ragged, small
from helpers.tiny_training import tiny_peft
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.lora.config import LoraConfig
from lorakeet.patches import fused_layers as module
from lorakeet.patches.fused_layers import fused_layers
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.padding_free import padding_free
from lorakeet.quant.quantize import quantize_

GATELESS = {"mixtral", "phi3", "qwen2_moe", "qwen3_moe"}  # stacked experts, or gate and up in one
NORMLESS = {"olmo", "olmo2", "olmo3"}  # no trainable weight, or another rounding
UNROTATED = {"olmo", "olmo2", "olmo3", "phi3"}  # in fp32, or only a part of each head


def replaced(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_modules(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(small(kind)).train()
    for name, parameter in model.named_parameters():
        if "norm" in name and "lora" not in name:
            parameter.requires_grad_("layers.0" in name)  # some norms are trainable
    expected = outcome(model, ragged())
    with fused_layers(model):
        changed = {type(m).__name__ for m in replaced(model)}
        assert any("RMSNorm" in name for name in changed) != (kind in NORMLESS)
        assert any("MLP" in name for name in changed) != (kind in GATELESS)
        assert any("Attention" in name for name in changed) != (kind in UNROTATED)
        found = outcome(model, ragged())
    assert "stays unpatched" not in caplog.text
    assert_same(found, expected)
    assert not replaced(model)
    assert_same(outcome(model, ragged()), expected, 0.0)


@pytest.mark.parametrize("kind", ["gemma3_text", "llama", "qwen3"])
def test_half_precision(kind: str) -> None:
    model = small(kind).to(torch.bfloat16).train()
    x = torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    for part in (model.model.layers[0].mlp, model.model.layers[1].input_layernorm):
        expected = _through(part, x)
        with fused_layers(model):
            assert part.__dict__.get("forward") is not None
            found = _through(part, x)
        for mine, true in zip(found, expected, strict=True):
            assert mine.dtype == torch.bfloat16
            assert (mine - true).float().norm() <= 0.01 * true.float().norm()


def _through(part: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    leaf = x.clone().requires_grad_()
    y = part(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16())
    return y.detach(), gradient


def test_autocast() -> None:
    model = adapted(small("llama")).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(model, ragged())
        with fused_layers(model):
            found = outcome(model, ragged())
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).float().norm() <= 0.02 * value.float().norm() + 1e-6, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_together_with_the_other_patches(reentrant: bool) -> None:
    model: Any = adapted(small("llama")).train()
    expected = outcome(model, ragged())
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    labels = ragged()["input_ids"].masked_fill(ragged()["attention_mask"] == 0, -100)
    loss = model(**ragged(), labels=labels).loss
    with padding_free(model), fused_loss(model), fused_layers(model):
        assert_same(outcome(model, ragged()), expected)
        torch.testing.assert_close(model(**ragged(), labels=labels).loss, loss, rtol=1e-5, atol=1e-6)


def test_dropout_of_an_adapter_inside_is_drawn_as_before() -> None:
    model = tiny_peft(0.5, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False).train()
    ids = ragged()["input_ids"] % 40
    torch.manual_seed(4)
    expected = model(input_ids=ids).logits
    torch.manual_seed(4)
    with fused_layers(model):
        assert "LlamaMLP" in {type(m).__name__ for m in replaced(model)}
        found = model(input_ids=ids).logits
        drawn = torch.rand(1)
    torch.testing.assert_close(found, expected)
    torch.manual_seed(4)
    model(input_ids=ids)
    assert torch.equal(torch.rand(1), drawn)


def test_evaluation_runs_the_own_forwards() -> None:
    model = small("llama")
    expected = model(**ragged()).logits
    with fused_layers(model):
        assert torch.equal(model(**ragged()).logits, expected)
        assert model.state_dict().keys() == small("llama").state_dict().keys()


class LouderMLP(tf.models.llama.modeling_llama.LlamaMLP):
    """MLP of another package, whose forward is unknown."""


def test_unknown_modules_are_not_patched(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(small("gpt2")).train()
    with fused_layers(model):
        assert not replaced(model)
    llama = small("llama")
    llama.model.layers[0].mlp.__class__ = LouderMLP
    llama.model.layers[1].mlp.act_fn = nn.ReLU()
    with fused_layers(llama):
        assert not any("MLP" in type(m).__name__ for m in replaced(llama))
    assert "stays unpatched" not in caplog.text


def test_a_module_that_differs_is_not_patched_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(small("llama")).train()
    monkeypatch.setitem(module.NORMS, "Llama", True)  # as if a new version added 1 to the weight
    expected = outcome(model, ragged())
    monkeypatch.setattr(
        module, "_norm", lambda norm, one_more, x: module.rms_norm(x, norm.weight, norm.variance_epsilon, one_more)
    )
    with fused_layers(model):
        assert {type(m).__name__ for m in replaced(model)} == {"LlamaAttention", "LlamaMLP", "Linear"}
        assert_same(outcome(model, ragged()), expected)
    assert caplog.text.count("LlamaRMSNorm does not match its patch and stays unpatched") == 1


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate neighboring columns instead of halves."""

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos.unsqueeze(unsqueeze_dim) + pairs * sin.unsqueeze(unsqueeze_dim)

    return rotated(q), rotated(k)


def test_an_attention_whose_rotation_differs_is_not_patched_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(small("llama")).train()
    llama = tf.models.llama.modeling_llama
    true = llama.apply_rotary_pos_emb
    for other in (interleaved, lambda q, k, cos, sin, position_ids=None, unsqueeze_dim=1: true(q, k, cos, sin)):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(llama, "apply_rotary_pos_emb", other)
            expected = outcome(model, ragged())
            with fused_layers(model):
                assert not any("Attention" in type(m).__name__ for m in replaced(model))
                assert_same(outcome(model, ragged()), expected)
        assert caplog.text.count("LlamaAttention does not match its patch and stays unpatched") == 1


def test_an_attention_with_a_replaced_forward_keeps_it() -> None:
    model: Any = adapted(small("llama")).train()
    attention = model.model.layers[0].self_attn
    own = attention.forward
    attention.forward = other = lambda *args, **settings: own(*args, **settings)
    expected = outcome(model, ragged())
    with fused_layers(model):
        assert attention.forward is other
        assert model.model.layers[1].self_attn in replaced(model)
        assert_same(outcome(model, ragged()), expected)


def test_the_fused_rotation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[torch.Size] = []
    real = module.rotary
    monkeypatch.setattr(module, "rotary", lambda x, cos, sin: turned.append(x.shape) or real(x, cos, sin))
    model = small("llama").train()
    with fused_layers(model):
        turned.clear()
        model(**ragged())
        assert len(turned) == 2 * len(model.model.layers)
        model.eval()(**ragged())
    model.train()(**ragged())
    assert len(turned) == 2 * len(model.model.layers)


def test_forwards_are_restored_after_an_error() -> None:
    model = small("llama").train()
    with pytest.raises(IndexError), fused_layers(model):
        model(input_ids=torch.tensor([[99]]))
    assert not replaced(model)
    copy.deepcopy(model)


def test_a_replaced_forward_is_restored() -> None:
    model = small("llama").train()
    with fused_layers(model):
        before = {m: m.forward for m in replaced(model)}
        with fused_layers(model):
            assert all(m.forward is not forward for m, forward in before.items())
        assert {m: m.forward for m in replaced(model)} == before
    assert before and not replaced(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_bytes_are_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    model = small("llama", hidden_size=64, intermediate_size=176, num_hidden_layers=4)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).to(dtype).train()
    ids = torch.randint(2, 61, (4, 32), generator=torch.Generator().manual_seed(2))

    def kept() -> int:
        tensors: dict[int, Tensor] = {}
        weights = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t):
            logits = model(input_ids=ids).logits
        assert logits.requires_grad
        return sum(t.untyped_storage().nbytes() for pointer, t in tensors.items() if pointer not in weights)

    before = kept()
    with fused_layers(model):
        after = kept()
    hidden, inner = ids.numel() * 64 * dtype.itemsize, ids.numel() * 176 * dtype.itemsize
    norms = 2 * 4  # without the first, whose input needs no gradient
    slack = 0.04 * 4 * inner  # gates are products, whose buffers are slightly larger
    assert before - after >= 4 * inner - slack + (norms * hidden if dtype == torch.bfloat16 else 0)


def test_frozen_layers_free_their_buffers() -> None:
    """Linear layers without an adapter get a fused forward; those inside of adapters keep their own."""
    model = get_peft_model(small("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    with fused_layers(model):
        changed = {name for name, m in model.named_modules() if type(m) is nn.Linear and "forward" in m.__dict__}
        assert {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj", "lm_head"} <= changed
        assert not any("base_layer" in name or "lora" in name for name in changed)
        down.weight.requires_grad_()
        down(torch.randn(3, down.in_features)).sum().backward()
        assert down.weight.grad is not None, "what learns after all gets its gradient"
    assert not replaced(model)


def test_gates_on_8_bit_weights_are_kept_in_bf16() -> None:
    model = small("llama", hidden_size=64, intermediate_size=176, num_hidden_layers=2)
    quantize_(model.requires_grad_(False))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).train()
    ids = torch.randint(2, 61, (4, 32), generator=torch.Generator().manual_seed(2))
    learned = [p for p in model.parameters() if p.requires_grad]

    def logits_and_gradients() -> tuple[Tensor, list[Tensor]]:
        logits = model(input_ids=ids).logits
        return logits, list(torch.autograd.grad(logits.square().sum(), learned))

    wide: list[Tensor] = []
    plain, exact = logits_and_gradients()
    with fused_layers(model), torch.autograd.graph.saved_tensors_hooks(lambda t: wide.append(t) or t, lambda t: t):
        fused, gradients = logits_and_gradients()
    assert_same({"logits": fused}, {"logits": plain}, 1e-4)  # the rounding error of activations differs
    inner = [t.dtype for t in wide if t.shape[-1] == 176 and t.dtype != torch.int8]
    assert inner == [torch.bfloat16] * 4
    off = [float((mine - true).norm() / true.norm()) for mine, true in zip(gradients, exact, strict=True)]
    assert 1e-6 < max(off) < 2e-2  # both round gradients to 8 bits, in different places
