"""A base whose weights stay in the 16 bits of its files: every result is that of the same base in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.tiny_architectures import build
from helpers.tiny_base import byte_tokenizer
from helpers.tiny_training import tiny_llama
from lorakeet.adapter.fingerprint import fingerprint
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.base.load import load_base
from lorakeet.kernels.cpu import features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.fixed_order import fixed_order
from lorakeet.lora.config import LoraConfig
from lorakeet.patches.fused_decoder import why_unfused
from lorakeet.patches.fused_layers import fused_layers
from lorakeet.patches.padding_free import padding_free
from lorakeet.quant.half import HalfEmbedding, HalfLinear, widen_
from lorakeet.quant.half_loading import HalfConfig, half_layers, stored_names
from lorakeet.quant.protocol import computing_dtypes, has_rounded, quantized_layers
from lorakeet.quant.quantize import quantize_
from lorakeet.train.checkpoints.fingerprint import base_hash

pytestmark = pytest.mark.skipif(not features.has(Feature.AVX2), reason="nothing is compiled for this processor")
IDS = torch.randint(3, 200, (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tied head in 16 bits, but one norm and one matrix in fp32."""
    made, tokenizer = tmp_path_factory.mktemp(request.param), byte_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, tie_word_embeddings=True, **ids)
    model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[request.param])
    wide = model.model.layers[1].mlp.up_proj, model.model.norm
    for module in wide:
        module.weight.data = module.weight.data.float() + torch.randn_like(module.weight.data, dtype=torch.float32) / 99
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def both(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    return load_base(str(folder)).model, load_base(str(folder), dtype="fp32").model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad(), fixed_order():
        found: Tensor = model(IDS).logits
    return found


def step(model: Any, **settings: Any) -> list[Tensor]:
    """Gradients of an adapter after one pass in training mode, as the trainer runs it."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", **settings)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    mask = torch.ones_like(IDS)
    mask[0, 20:] = 0
    with fixed_order(), padding_free(adapted), fused_layers(adapted):
        assert settings or why_unfused(adapted) is None  # the whole decoder layer is one operation
        adapted(IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100)).loss.backward()
    return [p.grad for p in adapted.parameters() if p.grad is not None]


def test_only_what_is_stored_in_16_bits_stays_so(folder: Path, both: tuple[Any, Any]) -> None:
    half, wide = both
    base = load_base(str(folder))
    assert "15 layers in 16 bits" in base.describe()
    assert base.dtype == torch.float32 and "fp32 on cpu" in base.describe() and not list(quantized_layers(wide))
    assert type(half.model.layers[1].mlp.up_proj) is nn.Linear and half.model.norm.weight.dtype == torch.float32
    assert isinstance(half.model.embed_tokens, HalfEmbedding) and isinstance(half.lm_head, HalfLinear)
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert not any(hasattr(half, name) for name in ("hf_quantizer", "is_quantized", "quantization_method"))
    assert getattr(half.config, "quantization_config", None) is None and half.config.dtype == torch.float32
    assert not has_rounded(half) and computing_dtypes(half) == {torch.float32}


@pytest.mark.parametrize("settings", [{"dtype": "fp32"}, {"bits": 32}, {"bits": 8}, {"dtype": "bf16"}])
def test_a_format_that_is_asked_for_is_kept(folder: Path, settings: dict[str, Any]) -> None:
    model = load_base(str(folder), **settings).model
    assert not any(isinstance(module, (HalfLinear, HalfEmbedding)) for module in model.modules())


def test_no_compiled_loops_no_16_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "has", lambda _: False)
    assert not list(quantized_layers(load_base(str(folder)).model))


def test_every_result_is_that_of_fp32(both: tuple[Any, Any]) -> None:
    half, wide = both
    assert torch.equal(logits(half), logits(wide))
    assert fingerprint(half) == fingerprint(wide) and base_hash(half) == base_hash(wide)
    found, expected = (model.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False) for model in both)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}],
)
def test_gradients_are_those_of_fp32(both: tuple[Any, Any], settings: dict[str, Any]) -> None:
    found, expected = (step(model, **settings) for model in both)
    assert found and all(map(torch.equal, found, expected))


def test_a_merge_is_that_of_fp32_and_can_be_undone(both: tuple[Any, Any]) -> None:
    before = logits(both[0])
    for model in both:
        step(model)
        model.eval()
        model.merge_adapter()
    assert torch.equal(logits(both[0]), logits(both[1])) and not torch.equal(logits(both[0]), before)
    for model in both:
        model.unmerge_adapter()
    assert both[0].model.layers[0].mlp.up_proj.base_layer.weight.dtype != torch.float32
    merged = [model.merge_and_unload().state_dict() for model in both]
    assert all(torch.equal(merged[0][name].float(), merged[1][name]) for name in merged[1])


def test_saving_resizing_widening_and_quantizing(both: tuple[Any, Any], tmp_path: Path) -> None:
    half, wide = both
    half.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], own) for name, own in wide.state_dict().items())
    for model in both:
        torch.manual_seed(0)
        model.resize_token_embeddings(300)
    assert torch.equal(logits(half), logits(wide)) and half.lm_head.weight is half.model.embed_tokens.weight
    assert [quantize_(model) for model in both] == [16, 16] and torch.equal(logits(half), logits(wide))


def test_widening_gives_the_fp32_model(both: tuple[Any, Any]) -> None:
    half, wide = both
    widen_(half)
    assert not list(quantized_layers(half)) and half.lm_head.weight is half.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), wide.parameters(), strict=True))


def test_a_trained_weight_gets_its_gradient(both: tuple[Any, Any]) -> None:
    layer = both[0].model.layers[0].mlp.up_proj
    layer.weight.requires_grad_()
    both[0](IDS).logits.sum().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.any())


@pytest.mark.parametrize(
    ("kind", "auto", "left"),
    [
        ("t5", tf.AutoModelForSeq2SeqLM, ("wo",)),  # wo stays in fp32, and its dtype is read
        ("gemma2", tf.AutoModelForCausalLM, ("embed_tokens", "lm_head")),  # an embedding that scales its rows
        ("gpt2", tf.AutoModelForCausalLM, ("c_attn",)),  # stored the other way round
        ("bloom", tf.AutoModelForCausalLM, ("dense", "dense_4h_to_h")),  # slices of these are read in one of its modes
        ("qwen3_moe", tf.AutoModelForCausalLM, ()),
    ],
)
def test_layers_whose_weight_others_read_stay_in_fp32(
    kind: str, auto: Any, left: tuple[str, ...], tmp_path: Path
) -> None:
    build(auto, kind).bfloat16().save_pretrained(tmp_path)
    half = auto.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=HalfConfig()).eval()
    wide = auto.from_pretrained(tmp_path, dtype=torch.float32).eval()
    names = {name.rpartition(".")[2] for name, _ in quantized_layers(half)}
    assert names and names.isdisjoint(left)
    given = {"input_ids": IDS % 61, **({"labels": IDS % 61} if kind == "t5" else {})}
    with torch.no_grad(), fixed_order():
        assert torch.equal(half(**given).logits, wide(**given).logits)


def test_a_model_of_unknown_code_is_left_alone(folder: Path) -> None:
    class Mine(tf.LlamaForCausalLM):
        pass

    model = Mine(load_base(str(folder), dtype="fp32").model.config)
    assert not half_layers(model, stored_names(model, folder.glob("*.safetensors")))
