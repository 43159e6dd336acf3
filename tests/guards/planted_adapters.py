"""Planted failures of adapters, bases and merges."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from guards.planting import first, logged, plants, refused
from helpers.tiny_base import save_base
from helpers.tiny_training import tiny_llama, tiny_peft
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.adapter.inspection_text import inspection_text
from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.base.device_dtype import check_dtypes
from lorakeet.base.load import load_base
from lorakeet.chat.template import render_chat
from lorakeet.lora.config import LoraConfig
from lorakeet.lora.linear import LoraLinear

#: A layer of the tiny model, as its adapter's file names it.
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def trained(**changes: Any) -> PeftModel:
    """Build the tiny model with an adapter that changes it."""
    return tiny_peft(0.0, init_lora_weights=False, **changes).eval()


def saved(folder: Path, change: Any = None) -> Path:
    """Save a trained adapter, with its tensors changed."""
    trained().save_pretrained(folder / "adapter")
    if change is not None:
        file = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder / "adapter"


@plants(1)
def targets_that_match_nothing(folder: Path) -> list[str]:
    config = LoraConfig(target_modules=["q_prj", "v_proj"], task_type="CAUSAL_LM")
    return [refused(get_peft_model, tiny_llama(), config)]


@plants(2)
def tensors_that_are_missing_or_unexpected(folder: Path) -> list[str]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{QUERY}.lora_C.weight"] = tensors.pop(f"{QUERY}.lora_A.weight")

    return [refused(PeftModel.from_pretrained, tiny_llama(), saved(folder, change))]


@plants(3)
def adapters_that_never_learned_or_are_not_finite(folder: Path) -> list[str]:
    with logged() as messages:
        tiny_peft().save_pretrained(folder / "untrained")
    with logged() as at_load:
        PeftModel.from_pretrained(tiny_llama(), folder / "untrained")
    inspected = first(inspection_text(inspect_adapter(folder / "untrained")).splitlines(), "all zero,")
    broken = trained()
    next(p for p in broken.parameters() if p.requires_grad).data[0, 0] = float("nan")
    return [messages[0], at_load[0], " ".join(inspected.split()), refused(broken.save_pretrained, folder / "broken")]


@plants(4)
def a_merge_that_is_not_the_adapter(folder: Path) -> list[str]:
    honest = LoraLinear.delta
    with patch.object(LoraLinear, "delta", lambda self, adapter: honest(self, adapter) * 1.01):
        return [refused(trained().merge_and_unload)]


@plants(5)
def a_merge_into_rounded_weights(folder: Path) -> list[str]:
    base = load_base(str(save_base(folder / "base")), bits=8, device="cpu")
    model = get_peft_model(base.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    return [refused(model.merge_adapter)]


@plants(9)
def a_layer_in_another_format(folder: Path) -> list[str]:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.half()
    return [refused(check_dtypes, model, torch.float32, "base")]


@plants(10)
def bytes_by_format(folder: Path) -> list[str]:
    save_base(folder / "base")
    tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=259).save_pretrained(folder / "base")
    described = load_base(str(folder / "base"), bits=8, dtype="fp32", device="cpu").describe()
    return [re.sub(r" \(\S+ products\)", "", described)]  # they depend on the processor


@plants(13)
def a_vocabulary_that_grew(folder: Path) -> list[str]:
    save_base(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(300, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with logged() as messages:
        model.save_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return [messages[0], refused(PeftModel.from_pretrained, base, folder / "adapter")]


@plants(14)
def a_conversation_without_a_template(folder: Path) -> list[str]:
    tokenizer = load_base(str(save_base(folder / "base")), device="cpu").tokenizer
    messages = [{"role": "user", "content": "hello"}]
    return [refused(render_chat, tokenizer, messages, add_generation_prompt=True)]


@plants(15)
def another_base(folder: Path) -> list[str]:
    for seed, name in enumerate(("base", "other")):
        tiny_llama(seed).save_pretrained(folder / name)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    model.save_pretrained(folder / "adapter")
    other = AutoModelForCausalLM.from_pretrained(folder / "other")
    return [refused(PeftModel.from_pretrained, other, folder / "adapter")]


@plants(22)
def scales_that_a_consumer_ignores(folder: Path) -> list[str]:
    trained(use_rslora=True).save_pretrained(folder / "adapter")
    text = inspection_text(inspect_adapter(folder / "adapter"))
    return [" ".join(first(text.splitlines(), name).split()) for name in ("llama.cpp", "Ollama")]


@plants(24)
def a_pickle(folder: Path) -> list[str]:
    adapter = saved(folder)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    return [refused(PeftModel.from_pretrained, tiny_llama(), adapter)]
