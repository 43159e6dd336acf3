"""A base in 8 bits: what is rounded and what is not, and that adapters train on it, move to the full base and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.tiny_tasks import save_tiny
from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.base.architectures import AUTO_CLASSES
from lorakeet.base.load import load_base
from lorakeet.errors import BaseModelError, MergeError
from lorakeet.lora.config import LoraConfig
from lorakeet.quant.int8 import Int8Embedding, Int8Linear
from lorakeet.quant.quantize import quantize_

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 2, 5, 9, 9, 1]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base", "llama")


def int8_names(model: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def test_layers_embedding_and_head_are_rounded(folder: Path) -> None:
    full, base = load_base(str(folder), dtype="fp32"), load_base(str(folder), bits=8, dtype="fp32")
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert int8_names(base.model) == {*layers, "lm_head"} and isinstance(base.model.model.embed_tokens, Int8Embedding)
    assert "16 layers in 8 bits" in base.describe() and "int8" in base.describe()
    a, b = full.model(IDS).logits, base.model(IDS).logits
    assert 0 < float((a - b).abs().max()) < 0.05 * float(a.abs().max())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_fresh_head_stays_as_it_is(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert")
    options = {"num_labels": 3}
    base = load_base(str(folder), bits=8, auto_class=AUTO_CLASSES["SEQ_CLS"], model_options=options)
    assert type(base.model.classifier) is torch.nn.Linear and type(base.model.bert.pooler.dense) is torch.nn.Linear
    assert isinstance(base.model.bert.encoder.layer[0].attention.self.query, Int8Linear)


def test_an_adapter_learns_on_eight_bits_and_moves_to_the_full_base(folder: Path, tmp_path: Path) -> None:
    base = load_base(str(folder), bits=8, dtype="fp32")
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    full = PeftModel.from_pretrained(load_base(str(folder), dtype="fp32").model, tmp_path / "adapter")
    model.eval()
    a, b = model(IDS).logits, full(IDS).logits
    assert float((a - b).abs().max()) < 0.05 * float(a.abs().max())
    again = PeftModel.from_pretrained(load_base(str(folder), bits=8, dtype="fp32").model, tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_merging_into_rounded_weights_is_refused(folder: Path) -> None:
    base = load_base(str(folder), bits=8)
    model = get_peft_model(base.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = model(IDS).logits
    with pytest.raises(MergeError, match="int8"):
        model.merge_adapter()
    assert torch.equal(model(IDS).logits, before)


def test_gpt2_stores_its_weights_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=61, initializer_range=0.2)
    full = GPT2LMHeadModel(config).eval()
    rounded = GPT2LMHeadModel(config).eval()
    rounded.load_state_dict(full.state_dict())
    assert quantize_(rounded.requires_grad_(False)) == 10
    a, b = full(IDS).logits, rounded(IDS).logits
    assert 0 < float((a - b).abs().max()) < 0.05 * float(a.abs().max())
    settings = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, base_model_name_or_path="tiny")
    get_peft_model(rounded, settings).save_pretrained(tmp_path)
    moved = PeftModel.from_pretrained(full, tmp_path)  # also: the fingerprint knows the base again
    assert float((moved(IDS).logits - rounded(IDS).logits).abs().max()) < 0.05 * float(a.abs().max())


def test_broken_weights_are_named(folder: Path) -> None:
    model = load_base(str(folder), dtype="fp32").model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(BaseModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        quantize_(model)
    assert not int8_names(model)


def test_twice_is_no_more_than_once_and_other_formats_are_refused(folder: Path) -> None:
    model = load_base(str(folder), bits=8).model
    assert quantize_(model) == 0
    model.config.quantization_config = {"quant_method": "other"}
    with pytest.raises(BaseModelError, match="quantized already"):
        quantize_(model)


def test_checkpointing_recomputes_the_same(folder: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = load_base(str(folder), bits=8)
        model = get_peft_model(base.model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) == 8
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
