"""The engine over the compiled pass answers as ``complete`` does for one prompt alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.bytewise import llama_config
from helpers.model_fixtures import save_model  # noqa: F401
from helpers.served import KINDS
from helpers.tiny import shake
from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.base.load import load_base
from lorakeet.inference.generate import complete
from lorakeet.kernels import paged
from lorakeet.lora.config import LoraConfig
from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.compiled import CompiledForward, compiled_forward
from lorakeet.serve.compiled.updates import read_updates
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.requests import Request, Sampling
from lorakeet.serve.engine.residents import Residents

pytestmark = pytest.mark.skipif(not paged.is_available(), reason="nothing is compiled on this machine")
PROMPTS = ["the dog", "a", "hello there, the weather", "x" * 70, "hello there, the weather is fine", "y" * 90]


def test_greedy(save_model: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    folder = save_model("base", LlamaForCausalLM(llama_config(head_dim=16)))
    for seed, rank in enumerate((3, 8)):
        adapted = get_peft_model(load_base(str(folder), dtype="fp32", device="cpu").model, LoraConfig(r=rank))
        shake(adapted, "default", seed=seed)
        adapted.save_pretrained(tmp_path / f"adapter{rank}")
    base = load_base(str(folder), dtype="fp32", device="cpu", bits=8)
    residents = Residents(base, tmp_path)
    names = [None, residents.load("adapter3").name]
    engine = Engine(base, residents, cache_bytes=1 << 20, prefill_tokens=16, make_forward=compiled_forward)
    names.append(residents.load("adapter8").name)
    assert [*residents.model.peft_config] == ["served1"]  # the later one needs no place in the model
    assert isinstance(engine.forward, CompiledForward)
    engine.start()
    given = [(name, prompt) for prompt in PROMPTS for name in names]
    tickets = [
        engine.submit(Request(base.tokenizer(prompt)["input_ids"], Sampling(temperature=0, max_tokens=12), name))
        for name, prompt in given
    ]
    found = [ticket.result().text for ticket in tickets]
    engine.stop()
    for at, name in enumerate(names):
        alone: Any = load_base(str(folder), dtype="fp32", device="cpu", bits=8)
        model = alone.model if name is None else PeftModel.from_pretrained(alone.model, tmp_path / name)
        texts = [complete(model, alone.tokenizer, [p], max_new_tokens=12, greedy=True)[0] for p in PROMPTS]
        assert found[at :: len(names)] == texts


def test_loads_leave_the_model_alone(save_model: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    """Nothing of a load or an unload waits for the steps, and each copy has the bits of one that is read from the model."""
    folder = save_model("base", LlamaForCausalLM(llama_config(head_dim=16)))
    for seed, (name, settings) in enumerate(KINDS.items()):
        adapted = get_peft_model(load_base(str(folder), dtype="fp32", device="cpu").model, LoraConfig(**settings))
        shake(adapted, "default", seed=seed)
        adapted.save_pretrained(tmp_path / name)
    residents, slow = (
        Residents(load_base(str(folder), dtype="fp32", device="cpu", bits=8), tmp_path) for _ in range(2)
    )
    config = residents.model.config
    pages = Pages(config.num_hidden_layers, 1, config.num_key_value_heads, 16, config.head_dim)
    residents.own_copy = CompiledForward(residents.model, pages).own_copy
    between: list[Any] = []
    residents.between_steps = lambda task: between.append(task) or task()
    for name in KINDS:
        resident, other = residents.load(name, scale=0.5), slow.load(name, scale=0.5)
        assert (resident.rank, resident.bytes, resident.digest) == (other.rank, other.bytes, other.digest)
        table = read_updates(slow.model, other.slot)
        if name == "head":
            assert resident.copy is table is None
            continue
        assert table is not None and not residents.model.peft_config and not between
        for one, expected in ((resident.copy._codes, table._codes), (resident.copy._scales, table._scales)):
            assert torch.equal(one, expected)
        outputs = zip(resident.copy._outputs, table._outputs, strict=True)
        assert all(one is expected is None or torch.equal(one, expected) for one, expected in outputs)
    del between[:]
    freed = [weakref.ref(resident.copy) for resident in residents.list() if resident.copy]
    for name in KINDS:
        residents.unload(name)
    del resident
    assert len(between) == 1 and not any(one() for one in freed) and not residents.model.peft_config
