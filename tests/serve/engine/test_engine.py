"""The engine answers as ``complete`` does for one prompt alone."""

from __future__ import annotations

from lorakeet.base.load import Base
from lorakeet.inference.generate import complete
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.requests import Request, Sampling
from lorakeet.serve.engine.residents import Residents


def test_greedy(base: Base) -> None:
    engine = Engine(base, Residents(base), cache_bytes=1 << 22)
    engine.start()
    prompts = ["the dog", "a", "hello there, the weather", "x" * 70]
    tickets = [
        engine.submit(Request(base.tokenizer(p)["input_ids"], Sampling(temperature=0, max_tokens=12))) for p in prompts
    ]
    texts = [ticket.result().text for ticket in tickets]
    engine.stop()
    assert texts == [complete(base.model, base.tokenizer, [p], max_new_tokens=12, greedy=True)[0] for p in prompts]
