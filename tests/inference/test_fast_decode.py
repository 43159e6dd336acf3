"""Compiled decoding of 8-bit models: the same tokens as the layers' own forward, which still runs for hooked layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

from helpers.tiny import shake
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.inference.fast_decode import fast_decode
from lorakeet.kernels import decoder_step
from lorakeet.kernels.cpu import bindings
from lorakeet.lora.config import LoraConfig
from lorakeet.lora.linear import LoraLinear
from lorakeet.quant.quantize import quantize_

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 43,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": None,
}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **o: tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, mlp_bias=True, attention_bias=True, **o)),
    "mistral": lambda **o: tf.MistralForCausalLM(tf.MistralConfig(**SHAPE, sliding_window=7, **o)),
    "qwen2": lambda **o: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**SHAPE, "head_dim": 6}, **o)),
    "qwen3": lambda **o: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SHAPE, **o)),
}
PROMPTS = torch.tensor([[5, 6, 7, 8], [1, 1, 9, 10], [1, 3, 2, 5]])


def make(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family](**options).eval().requires_grad_(False)
    for parameter in model.parameters():  # biases and norms start at 0 and 1 everywhere, small weights make all alike
        parameter.copy_(parameter * 5 if parameter.ndim > 1 else parameter + 0.3 * torch.randn_like(parameter))
    quantize_(model)
    return model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the batch size of each compiled step."""
    taken: list[int] = []
    own = decoder_step.before_attention

    def counted(layer: Any, x: torch.Tensor, *rest: Any) -> Any:
        taken.append(x.shape[0])
        return own(layer, x, *rest)

    monkeypatch.setattr(decoder_step, "before_attention", counted)
    yield taken


def write(model: Any, quick: bool, ids: torch.Tensor = PROMPTS[:1], **options: Any) -> tuple[torch.Tensor, Any]:
    """Return greedy tokens and the logits of each."""
    options = {"do_sample": False, "max_new_tokens": 14, **options}
    with fast_decode(model) if quick else nullcontext():
        out = model.generate(
            input_ids=ids, attention_mask=(ids != 1).long(), output_logits=True, return_dict_in_generate=True, **options
        )
    return out.sequences, torch.stack(out.logits)


def same(model: Any, *args: Any, **options: Any) -> None:
    tokens, logits = write(model, True, *args, **options)
    plain_tokens, plain = write(model, False, *args, **options)
    assert torch.equal(tokens, plain_tokens)
    assert float((logits - plain).abs().max()) < 3e-5 * float(plain.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_as_the_layers_compute_it(family: str, steps: list[int]) -> None:
    model = make(family)
    same(model)
    per_text = 3 * 13 + 1  # the first token comes with the prompt; one layer is tried beforehand
    assert len(steps) == per_text
    same(model, PROMPTS)  # padded on the left
    assert steps[per_text + 1 :] == [3] * (per_text - 1)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_other_caches(options: dict[str, Any], steps: list[int]) -> None:
    same(make("llama"), **options)
    assert len(steps) >= 39


def test_more_texts_than_the_loops_are_for_go_the_usual_way(steps: list[int]) -> None:
    ids = torch.randint(2, 61, (17, 4))
    same(make("llama"), ids, max_new_tokens=3)
    assert not steps
    same(make("llama"), ids[:16], max_new_tokens=3)
    assert 16 in steps


def adapted(**options: Any) -> Any:
    settings = {"r": 5, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
    model = get_peft_model(make("llama"), LoraConfig(**{**settings, **options}, task_type="CAUSAL_LM")).eval()
    shake(model)
    return model


def test_an_adapter_is_heard_and_can_be_switched_between_tokens(steps: list[int]) -> None:
    model = adapted(lora_dropout=0.4)
    same(model)
    assert len(steps) == 40
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj", "gate_proj"], task_type="CAUSAL_LM"))
    shake(model, "other", seed=9)

    def story(quick: bool) -> torch.Tensor:
        said, cache = [], tf.DynamicCache()
        with torch.no_grad(), fast_decode(model) if quick else nullcontext():
            for turn, token in enumerate([5, 6, 7, 8, 9, 10]):
                model.set_adapter("other" if turn % 3 == 1 else "default")
                with model.disable_adapter() if turn % 3 == 2 else nullcontext():
                    said.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
        return torch.stack(said)

    plain, before = story(False), len(steps)  # the first pass of each mode is watched, layer by layer
    quick = story(True)
    assert float((quick - plain).abs().max()) < 3e-5 * float(plain.abs().max())
    assert len(steps) > before + 17
    model.set_adapter("default")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLinear)]
    with torch.no_grad(), fast_decode(model):
        one = model(torch.tensor([[5]]), past_key_values=tf.DynamicCache()).logits
        for layer in layers:
            if "default" in layer.scaling:
                layer.scaling["default"] *= 3
        other = model(torch.tensor([[5]]), past_key_values=tf.DynamicCache()).logits
    with torch.no_grad():
        plain = model(torch.tensor([[5]])).logits
    assert float((other - plain).abs().max()) < 3e-5 * float(plain.abs().max()) < float((other - one).abs().max())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_scales_outputs_and_adds_to_them(options: dict[str, Any], steps: list[int]) -> None:
    model = adapted(**options)
    same(model)
    assert len(steps) == 40
    shake(model, seed=5)
    same(model)


def test_what_the_loops_do_not_know_computes_as_ever(steps: list[int]) -> None:
    mixed = adapted()
    mixed.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    mixed.set_adapter(["default", "other"])
    same(mixed)
    same(make("llama", hidden_act="gelu"))
    same(make("llama", attn_implementation="eager"))
    tf.AttentionInterface.register("another", ALL_ATTENTION_FUNCTIONS["sdpa"])
    tf.AttentionMaskInterface.register("another", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    same(make("llama", attn_implementation="another"))
    same(make("llama"), output_hidden_states=True)  # by hooks of transformers
    half = make("llama").bfloat16()
    assert torch.equal(write(half, True)[0], write(half, False)[0])
    assert not steps
    full = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)).eval()
    with fast_decode(full):
        assert not any("forward" in module.__dict__ for module in full.modules())


def test_whoever_hooks_into_a_layer_is_called_for_every_token(steps: list[int]) -> None:
    model = make("llama")
    inner = model.model.layers[1]
    for module in (inner.mlp, inner.self_attn.k_proj, inner.mlp.act_fn, inner.input_layernorm):
        seen: list[Any] = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        write(model, True)
        assert len(seen) == 14
        handle.remove()
    steps.clear()
    write(model, True)
    assert len(steps) == 40


def test_training_gradients_and_changed_weights(steps: list[int]) -> None:
    model = make("llama")
    ids = torch.tensor([[7]])

    def once() -> torch.Tensor:
        cache = tf.DynamicCache()
        model(PROMPTS[:1], past_key_values=cache)
        return model(ids, past_key_values=cache).logits[0, -1]

    with fast_decode(model):
        once()
        assert not steps  # somebody may want a gradient
        with torch.no_grad():
            model.train()
            once()
            assert not steps
            model.eval()
            before = once()
            layer = model.model.layers[0].mlp.down_proj
            layer.weight.data = layer.weight.data.flip(0).contiguous()
            changed = once()
    with torch.no_grad():
        assert float((changed - once()).abs().max()) < 3e-5 * float(changed.abs().max())
    assert float((changed - before).abs().max()) > 1e-2 * float(changed.abs().max())
    assert len(steps) == 7


class OtherMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def test_a_kind_of_layer_that_differs_is_found_and_said(caplog: pytest.LogCaptureFixture, steps: list[int]) -> None:
    model = make("llama")
    model.model.layers[1].mlp.__class__ = OtherMLP
    same(model)
    assert "LlamaDecoderLayer does not match its patch" in caplog.text
    assert len(steps) == 2 * 13 + 2  # two layers, and one try for each kind


def test_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    model = make("qwen3")
    with pytest.raises(KeyError), fast_decode(model):
        assert all("forward" in layer.__dict__ for layer in model.model.layers)
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())
    monkeypatch.setattr(bindings, "library", lambda: None)
    same(model)
    assert not steps


def test_weights_that_do_not_fit_are_refused() -> None:
    model = make("llama").model.layers[0]
    linears = [getattr(model.self_attn, f"{name}_proj").decoder_weights() for name in "qkvo"]
    linears += [getattr(model.mlp, f"{name}_proj").decoder_weights() for name in ("gate", "up", "down")]
    norms = [
        decoder_step.Norm(model.input_layernorm.weight, 1e-6),
        decoder_step.Norm(model.input_layernorm.weight, 1e-6),
        None,
        None,
    ]
    decoder_step.Layer(linears, norms, 10, 0.3)
    wrong = {
        "heads": (linears, norms, 7),
        "shapes": ([*linears[:6], linears[5]], norms, 10),
        "a norm": (linears, [decoder_step.Norm(torch.ones(7), 1e-6), *norms[1:]], 10),
        "a scale": ([linears[0]._replace(scale=linears[0].scale[:-1]), *linears[1:]], norms, 10),
        "half an update": ([linears[0]._replace(a=torch.ones(2, 36)), *linears[1:]], norms, 10),
        "an update": ([linears[0]._replace(a=torch.ones(2, 36), b=torch.ones(60, 3)), *linears[1:]], norms, 10),
    }
    for given in wrong.values():
        with pytest.raises(ValueError):
            decoder_step.Layer(*given, 0.3)
    layer = decoder_step.Layer(linears, norms, 10, 0.3)
    x, q = torch.randn(2, 1, 36), torch.randn(2, 1, 6, 10)
    keys = torch.randn(2, 2, 5, 10)
    for odd in (keys[:1], keys[:, :1], keys.double(), keys[..., :9]):
        with pytest.raises(ValueError):
            decoder_step.after_attention(layer, x, q, odd, odd)
    with pytest.raises(ValueError):
        decoder_step.after_attention(layer, x, q, keys, keys, torch.ones(2, 4, dtype=torch.bool))


def test_attention_is_as_exact_as_fp32_allows() -> None:
    """Set weights so that the output is the attention weights alone: the rest of the layer passes them on or adds zero."""
    eye, none, scale = (127 * torch.eye(64)).to(torch.int8), torch.zeros(64, 64, dtype=torch.int8), torch.ones(64) / 127
    linears = [decoder_step.LinearWeights(weight, scale) for weight in (eye, eye, eye, eye, none, none, none)]
    layer = decoder_step.Layer(linears, [decoder_step.Norm(torch.ones(64), 1e-6)] * 2 + [None, None], 64, 0.5)
    scores = torch.linspace(-30, 0, 64)
    q, keys = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 64, 64)
    q[..., 0], keys[..., 0] = 1, 2 * scores
    got = decoder_step.after_attention(layer, torch.zeros(1, 1, 64), q, keys, torch.eye(64).view(1, 1, 64, 64))
    assert torch.allclose(got.flatten().double(), scores.double().softmax(0), rtol=2e-6, atol=0)
