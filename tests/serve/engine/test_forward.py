"""Forward passes: each architecture over its cache, and each sort of adapter in a batch with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.bytewise import byte_tokenizer
from helpers.small_models import small
from helpers.tiny import shake
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.base.load import Base
from lorakeet.errors import AdapterError, BaseModelError, RequestError
from lorakeet.inference.generate import complete
from lorakeet.inference.predict import predict
from lorakeet.loaded_model import LoadedModel
from lorakeet.lora.config import LoraConfig
from lorakeet.serve.engine.choose_forward import choose_forward, make_pages
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.forward import Forward, Piece, PlainForward, Sequence
from lorakeet.serve.engine.own_cache import OwnCacheForward
from lorakeet.serve.engine.requests import Request, Sampling
from lorakeet.serve.engine.residents import Resident, Residents
from lorakeet.tasks.task import Task

#: Architecture -> whether its cache is pages, and settings of its small model.
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "llama": (True, {}),
    "bloom": (True, {"attention": "eager"}),
    "opt": (True, {}),
    "gemma2": (False, {}),
    "mamba": (False, {"attention": "eager"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_architecture(kind: str) -> None:
    paged, settings = KINDS[kind]
    model = small(kind, vocab_size=260, initializer_range=0.3, eos_token_id=1, **settings)
    base = Base(model, byte_tokenizer(), kind, torch.float32, torch.device("cpu"))
    prompts = ["the dog", "a", "hello there"]
    expected = [complete(model, base.tokenizer, [prompt], max_new_tokens=9, greedy=True)[0] for prompt in prompts]
    engine = Engine(base, Residents(base), page_tokens=4, cache_bytes=1 << 20, prefill_tokens=3)
    assert isinstance(engine.forward, PlainForward if paged else OwnCacheForward)
    tickets = []
    for prompt in prompts:  # each begins while the ones before go on
        ids = base.tokenizer(prompt)["input_ids"]
        tickets.append(engine.submit(Request(ids, Sampling(temperature=0, max_tokens=9))))
        engine.step()
    while not all(ticket.done for ticket in tickets):
        engine.step()
    assert [ticket.result().text for ticket in tickets] == expected


def test_encoder_decoder_is_refused() -> None:
    model = small("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(BaseModelError, match="encoder-decoder"):
        choose_forward(model, 4, 1 << 20)


def test_pass_that_is_wrong_is_not_used() -> None:
    """A pass that hides nothing, or forgets, differs from the model; the plain one takes its place."""

    class Forgetful(PlainForward):
        def run(self, pieces: Any) -> Tensor:
            return super().run([piece._replace(ids=piece.ids[-1:]) for piece in pieces])

    model = small("llama")
    assert type(choose_forward(model, 4, 1 << 20, Forgetful)) is PlainForward


#: Adapters of all sorts of layers and variants.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    "adalora": ("llama", {"target_modules": ["q_proj"], "adalora_config": {"init_r": 2, "target_r": 1}}),
    "vera": ("llama", {"target_modules": ["q_proj", "up_proj"], "vera_config": True}),
    "bias": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tokens": ("llama", {"target_modules": ["v_proj"], "trainable_token_indices": [5, 9]}),
    "head": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "experts": ("qwen3_moe", {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]}),
    "router": ("qwen2_moe", {"target_modules": ["shared_expert.up_proj", "v_proj"]}),
}


def last_logits(forward: Forward, adapters: list[Resident | None]) -> Tensor:
    """Compute texts of different lengths, one with each adapter: prompts one by one, and then two tokens in a batch."""
    assert forward.pages is not None
    rows = [Sequence(adapter, forward.pages.take(3)) for adapter in adapters]
    for number, row in enumerate(rows):
        ids = [5, 6, 7, 9, 11][: 2 + number]
        forward.run([Piece(row, ids)])
        row.length += len(ids)
    for token in (9, 5):
        logits = forward.run([Piece(row, [token]) for row in rows])
        for row in rows:
            row.length += 1
    for row in rows:
        for page in row.pages:
            forward.pages.release(page)
    return logits


@pytest.mark.parametrize("name", ADAPTERS)
@torch.inference_mode()
def test_adapter_in_a_batch(name: str) -> None:
    kind, settings = ADAPTERS[name]
    with torch.inference_mode(False):
        model = get_peft_model(small(kind), LoraConfig(r=2, **settings))
        model.add_adapter("other", LoraConfig(r=3, target_modules=["c_attn" if kind == "gpt2" else "v_proj"]))
        shake(model, "default")
        shake(model, "other", seed=4)
        model.eval()
    one, other = Resident("one", 1, "default", "1"), Resident("other", 2, "other", "2")
    one.mixes = name != "experts"
    pages = make_pages(model, 4, 1 << 20)
    assert pages is not None
    together = last_logits(PlainForward(model, pages), [None, one, other, one])
    alone = last_logits(PlainForward(model, pages, batched=False), [None, one, other, one])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    base = last_logits(PlainForward(model, pages), [None] * 4)
    assert all((together[row] - base[row]).abs().max() > 1e-3 for row in (1, 2, 3))


def test_rows_that_cannot_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that gets some of the rows, as that of an expert, refuses a mixed batch; the rows run by adapter then."""
    model = get_peft_model(small("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    shake(model)
    model.eval()
    adapter, own = Resident("one", 1, "default", "1"), PlainForward._run_rows

    def refuse(self: PlainForward, batch: Any) -> Tensor:
        if len({piece.sequence.adapter for piece in batch}) > 1:
            raise AdapterError("a layer got 1 rows in a mixed batch of 2")
        return own(self, batch)

    monkeypatch.setattr(PlainForward, "_run_rows", refuse)
    pages = make_pages(model, 4, 1 << 20)
    assert pages is not None
    with torch.inference_mode():
        together = last_logits(PlainForward(model, pages), [None, adapter, None])
        alone = last_logits(PlainForward(model, pages, batched=False), [None, adapter, None])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not adapter.mixes


def test_encoder(tmp_path: Path) -> None:
    model = small("bert", head="classifier", vocab_size=260, num_labels=2)
    base = Base(model, byte_tokenizer(), "bert", torch.float32, torch.device("cpu"))
    opened = LoadedModel(base, {}, Task("SEQ_CLS", "single_label", ("bad", "good")))
    base.tokenizer.pad_token = "</s>"
    texts = ["the dog", "a"]
    alone = predict(model, base.tokenizer, "SEQ_CLS", texts)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    shake(adapted)
    adapted.save_pretrained(tmp_path / "mood", notes={"task": opened.task.notes()})
    expected = predict(adapted.eval(), base.tokenizer, "SEQ_CLS", texts)
    adapted.unload()
    engine = Engine(opened, Residents(opened, tmp_path))
    engine.start()
    engine.residents.load("mood")
    found = [engine.encode(texts), engine.encode(texts, "mood"), engine.encode(texts)]
    with pytest.raises(RequestError, match="SEQ_CLS"):
        engine.submit(Request([1]))
    engine.stop()
    assert found == [alone, expected, alone] and alone != expected
