"""Scheduling: no stream stalls, no request is starved, and pages are given back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from helpers.served import Served
from lorakeet.errors import EngineStopped, QueueFull, RequestError, UnknownAdapter
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.requests import Request, Sampling, Ticket
from lorakeet.serve.engine.residents import Residents

GREEDY = {"temperature": 0.0, "ignore_end": True}


@pytest.fixture(scope="module")
def make(served: Served) -> Callable[..., Engine]:
    base = served.base()
    residents = Residents(base, served.adapters)
    for name in ("plain", "rslora"):
        residents.load(name)

    def build(**settings: Any) -> Engine:
        return Engine(base, residents, **{"page_tokens": 4, "cache_bytes": 60 * 1024, "prefill_tokens": 8, **settings})

    return build


@pytest.fixture
def engine(make: Callable[..., Engine]) -> Engine:
    return make()


def ask(engine: Engine, prompt: int | Sequence[int] = 3, adapter: str | None = None, **settings: Any) -> Ticket:
    deadline = settings.pop("deadline", None)
    ids = list(range(10, 10 + prompt)) if isinstance(prompt, int) else prompt
    return engine.submit(Request(ids, Sampling(**{**GREEDY, "max_tokens": 5, **settings}), adapter, deadline))


def counts(ticket: Ticket) -> int:
    return sum(len(chunk.tokens) for chunk in ticket._chunks)


def run(engine: Engine, *tickets: Ticket) -> Iterator[int]:
    """Run steps until all tickets are done."""
    steps = 0
    while not all(ticket.done for ticket in tickets):
        engine.step()
        steps += 1
        assert steps < 500
        yield steps


def unused(engine: Engine) -> int:
    """Return the pages that no sequence has."""
    stats = engine.stats()
    return stats.pages_free + stats.pages_cached


def test_streams_go_on_while_a_long_prompt_is_read(engine: Engine) -> None:
    first = ask(engine, max_tokens=40)
    engine.step()
    long = ask(engine, list(range(70)), max_tokens=2)
    tokens = []
    for _ in run(engine, long):
        tokens.append(engine.stats().new_tokens[None])
    assert len(tokens) > 8  # the prompt is cut
    assert all(later - earlier >= 1 for earlier, later in pairwise(tokens))
    assert not first.done


def test_short_prompt_overtakes_a_long_one(engine: Engine) -> None:
    engine._scheduler.idle_prefill_tokens = 8
    long, short = ask(engine, list(range(100))), ask(engine, 5)
    list(run(engine, short))
    assert counts(long) == 0
    list(run(engine, long))


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_cancel(engine: Engine, steps: int) -> None:
    tickets = [ask(engine, list(range(index, index + 30)), max_tokens=30) for index in range(3)]
    for _ in range(steps):
        engine.step()
    for ticket in tickets:
        ticket.cancel()
    engine.step()
    engine.step()
    assert [ticket.result().finish for ticket in tickets] == ["cancelled"] * 3
    assert unused(engine) == engine.stats().pages and engine.stats().rows == 0


def test_deadline(engine: Engine) -> None:
    late = ask(engine, deadline=time.monotonic() - 1)
    soon = ask(engine, max_tokens=100, deadline=time.monotonic() + 0.05)
    engine.step()
    assert late.result().finish == "deadline" and not late.result().tokens
    time.sleep(0.05)
    engine.step()
    result = soon.result()
    assert result.finish == "deadline" and 0 < result.usage.completion_tokens < 100
    assert unused(engine) == engine.stats().pages


def test_full_queue(make: Callable[..., Engine]) -> None:
    engine, events = make(queue=2), []
    engine.listen(events.append)
    tickets = [ask(engine, adapter="plain") for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        ask(engine, adapter="plain")
    list(run(engine, *tickets))
    assert [event.kind for event in events].count("refused") == 1
    assert all(one.users == 0 for one in engine.residents.list())


def test_adapters_take_turns(make: Callable[..., Engine]) -> None:
    engine = make(max_rows=1)
    crowd = [ask(engine, adapter="plain") for _ in range(5)]
    alone = ask(engine, adapter="rslora")
    list(run(engine, alone))
    assert [ticket.done for ticket in crowd] == [True, False, False, False, False]
    list(run(engine, *crowd))


def test_large_request_is_not_starved(make: Callable[..., Engine]) -> None:
    engine = make(cache_bytes=16 * 1024)
    pages = engine.stats().pages
    before = [ask(engine, 4, max_tokens=4 * (pages // 2) - 4)]
    engine.step()
    large = ask(engine, 4, max_tokens=4 * pages - 4)
    after = [ask(engine, 2, max_tokens=2) for _ in range(4)]
    list(run(engine, large))
    assert all(ticket.done for ticket in before) and not any(ticket.done for ticket in after)
    list(run(engine, *after))


def test_shared_beginning(engine: Engine) -> None:
    """Requests that come together with one beginning compute it once."""
    beginning = list(range(20, 60))
    tickets = [ask(engine, [*beginning, 100 + index]) for index in range(4)]
    list(run(engine, *tickets))
    assert [ticket.result().usage.cached_tokens for ticket in tickets] == [0, 40, 40, 40]
    again = ask(engine, [*beginning, 99], adapter="plain")
    list(run(engine, again))
    assert again.result().usage.cached_tokens == 0  # of the base, not of the adapter


def test_answers_are_found_again(engine: Engine) -> None:
    first = ask(engine, 10, max_tokens=10)
    list(run(engine, first))
    second = ask(engine, [*range(10, 20), *first.result().tokens, 7])
    list(run(engine, second))
    assert second.result().usage.cached_tokens == 16


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([]), "no token"),
        (Request([5000]), "token 5000"),
        (Request([-1]), "token -1"),
        (Request([1], Sampling(max_tokens=0)), "max_tokens"),
        (Request([1], Sampling(temperature=float("nan"))), "temperature"),
        (Request([1], Sampling(top_p=0)), "top_p"),
        (Request([1], Sampling(logit_bias={9999: 1.0})), "logit_bias"),
        (Request([1] * 128), "window of 128"),
    ],
)
def test_out_of_range(engine: Engine, request_: Request, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.submit(request_)


def test_more_than_the_pool(make: Callable[..., Engine]) -> None:
    with pytest.raises(RequestError, match="expected at most the cache's 16"):
        ask(make(cache_bytes=4 * 1024), 10, max_tokens=50)


def test_unknown_adapter(engine: Engine) -> None:
    with pytest.raises(UnknownAdapter, match="rslora"):
        ask(engine, adapter="rslore")


def test_failing_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = ask(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.forward, "run", lambda pieces: 1 / 0)
        engine.step()
    assert doomed.result().finish == "error" and "division" in str(doomed.result().error)
    fine = ask(engine)
    list(run(engine, fine))
    assert fine.result().finish == "length" and unused(engine) == engine.stats().pages


def test_listener_that_fails_has_left(engine: Engine) -> None:
    ticket = ask(engine, max_tokens=50)
    ticket.listen(lambda chunk: 1 / 0)  # type: ignore[arg-type, return-value]
    list(run(engine, ticket))
    assert ticket.result().finish == "cancelled"


def test_stop(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.start()
    tickets = [ask(engine, max_tokens=20) for _ in range(20)]
    engine.stop(drain=True)
    assert {ticket.result().finish for ticket in tickets} == {"length"}
    with pytest.raises(EngineStopped):
        ask(engine)
    engine = make()
    engine.start()
    tickets = [ask(engine, max_tokens=100) for _ in range(20)]
    engine.stop(drain=True, timeout=0.01)
    assert "cancelled" in {ticket.result().finish for ticket in tickets}
    assert unused(engine) == engine.stats().pages


def test_many_threads(make: Callable[..., Engine]) -> None:
    engine, results = make(queue=100), []

    def caller(number: int) -> None:
        for name in (None, "plain", "rslora"):
            results.append((name, tuple(ask(engine, 6 + number % 2, adapter=name).result().tokens)))

    engine.start()
    threads = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.stop()
    assert len(results) == 24 and len(set(results)) == 6


def test_failing_meter(engine: Engine) -> None:
    events = []
    engine.listen(lambda event: 1 / 0)  # type: ignore[arg-type, return-value]
    engine.listen(events.append)
    ticket = ask(engine)
    list(run(engine, ticket))
    assert ticket.result().finish == "length"
    assert [event.kind for event in events] == ["queued", "admitted", "first_token", *["token"] * 4, "finished"]


def test_waiting_request_holds_no_pages(make: Callable[..., Engine]) -> None:
    engine = make(cache_bytes=16 * 1024)
    first = ask(engine, 9, max_tokens=1)
    list(run(engine, first))
    large = ask(engine, [200, 201], max_tokens=40)
    engine.step()
    again = ask(engine, 9, max_tokens=50)  # the cache has its beginning, and it waits for the rest
    list(run(engine, large, again))
    assert again.result().usage.cached_tokens == 8
    assert engine.pages is not None
    assert all(engine.pages.references(page) <= 1 for page in range(16))


def test_pages_are_cleared_as_they_are_reached(make: Callable[..., Engine]) -> None:
    """What an earlier request left, NaN even, is not seen; and to begin a long answer takes no long clearing."""
    answers = []
    for left in (0.0, float("nan")):
        engine = make()
        assert engine.pages is not None
        with torch.inference_mode():
            engine.pages.keys.fill_(left)
            engine.pages.values.fill_(left)
        tickets = [ask(engine, 5, max_tokens=40), ask(engine, 11, max_tokens=9), ask(engine, 3, adapter="plain")]
        engine.step()
        if left:
            assert engine.pages.keys.isnan().any(dim=-1).sum() > 10  # pages that are taken and not reached
        list(run(engine, *tickets))
        answers.append([ticket.result().tokens for ticket in tickets])
        assert [ticket.result().finish for ticket in tickets] == ["length"] * 3
    assert answers[0] == answers[1]
