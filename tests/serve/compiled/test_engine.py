"""The engine over the compiled pass answers as ``complete`` does for one prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from helpers.bytewise import llama_config
from helpers.model_fixtures import save_model  # noqa: F401
from helpers.tiny import shake
from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.base.load import load_base
from lorakeet.inference.generate import complete
from lorakeet.kernels import paged
from lorakeet.lora.config import LoraConfig
from lorakeet.serve.compiled import CompiledForward, compiled_forward
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
    names = [None, *(residents.load(f"adapter{rank}").name for rank in (3, 8))]
    engine = Engine(base, residents, cache_bytes=1 << 20, prefill_tokens=16, make_forward=compiled_forward)
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
