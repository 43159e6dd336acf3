"""Same in any company: whatever runs beside it, each answer is the one that ``complete`` gives to its prompt alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from helpers.served import KINDS, Served
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.requests import Request, Sampling, Ticket
from lorakeet.serve.engine.residents import Residents

#: Beginnings that many prompts share, of several pages.
BEGINNINGS = ("", "the weather is ", "a system prompt that all of them begin with, the same, the ", "the the the")
ENDS = ("dog", "x", "what is it?", "he says: ", "the")


@dataclass
class Asked:
    """A request, and the folder of the adapter that must answer it."""

    ticket: Ticket
    adapter: str | None
    prompt: str
    max_tokens: int


class Company:
    """An engine in which random requests come and go; it is stepped by hand, so that each run is the same."""

    def __init__(self, served: Served) -> None:
        self.served = served
        base = served.base()
        self.tokenizer = base.tokenizer
        self.residents = Residents(base, served.adapters, allow_elsewhere=True)
        # a pool that a few long requests fill, so that pages are taken back and given out again all the time
        self.engine = Engine(
            base,
            self.residents,
            max_rows=6,
            page_tokens=4,
            cache_bytes=60 * 1024,
            prefill_tokens=7,
            idle_prefill_tokens=9,
        )
        self.version = dict.fromkeys(KINDS, "")
        for name in KINDS:
            self.residents.load(name)

    def mix(self, source: random.Random) -> Iterator[tuple[str, str]]:
        """Run one random mix; yields each answer and the one that was expected."""
        asked: list[Asked] = []
        left = source.randint(3, 9)
        while left or any(not one.ticket.done for one in asked):
            chance = source.random()
            if left and chance < 0.5:
                asked.append(self.ask(source))
                left -= 1
            elif chance < 0.55 and asked:
                source.choice(asked).ticket.cancel()
            elif chance < 0.6:
                self.reload(source.choice(list(KINDS)))
            else:
                self.engine.step()
        for one in asked:
            expected = self.served.answer(one.adapter, one.prompt, one.max_tokens)
            answer = one.ticket.result()
            assert answer.finish in ("stop", "length", "cancelled"), answer
            if answer.finish == "cancelled":  # it may end within a character
                text = answer.text.rstrip("\N{REPLACEMENT CHARACTER}")
                yield text, expected[: len(text)]
            else:
                yield answer.text, expected

    def ask(self, source: random.Random) -> Asked:
        """Submit a random request."""
        name = source.choice([None, *KINDS])
        prompt = source.choice(BEGINNINGS) + source.choice(ENDS)
        most = source.choice((1, 2, 5, 9))
        ids = self.tokenizer(prompt)["input_ids"]
        ticket = self.engine.submit(Request(ids, Sampling(temperature=0, max_tokens=most), name))
        return Asked(ticket, None if name is None else name + self.version[name], prompt, most)

    def reload(self, name: str) -> None:
        """Serve the other weights of an adapter under its name."""
        self.version[name] = "" if self.version[name] else "-2"
        self.residents.load(name, self.served.adapters / (name + self.version[name]))

    def check_pages(self) -> None:
        """Check that every page is free or in the prefix cache, and that no version is left over."""
        pages, prefixes = self.engine.pages, self.engine.prefixes
        assert pages is not None and prefixes is not None
        assert pages.free + len(prefixes) == len(pages)
        assert all(pages.references(page) <= 1 for page in range(len(pages)))
        assert len(self.residents.model.peft_config) == len(KINDS)


@pytest.fixture(scope="module")
def company(served: Served) -> Company:
    return Company(served)


@pytest.mark.parametrize("seed", range(3))
def test_same_in_any_company(company: Company, seed: int) -> None:
    source = random.Random(seed)
    for number in range(5):
        for answer, expected in company.mix(source):
            assert answer == expected, f"mix {number}"
    company.check_pages()
    assert sum(company.engine.stats().cached_tokens.values())


@pytest.mark.slow
def test_thousand_mixes(company: Company) -> None:
    source = random.Random(1000)
    same = [all(answer == expected for answer, expected in company.mix(source)) for _ in range(1000)]
    company.check_pages()
    assert sum(same) == len(same)
