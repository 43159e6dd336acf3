"""Throughput and latency of the server's engine, without HTTP: clients together, adapters mixed, prompts found again.

Usage::

    python benchmarks/serving.py            # a few minutes, on an idle machine
    python benchmarks/serving.py --short    # half a minute, to see it run

One process with one base in 8 bits and adapters of random values; rounds of all contenders alternate, and medians count.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from int8 import show
from lorakeet import LoraConfig, get_peft_model, load_base
from lorakeet.config import DEFAULT_MODEL
from lorakeet.inference.generate import complete
from lorakeet.serve.compiled import compiled_forward
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.requests import Request, Sampling, Ticket
from lorakeet.serve.engine.residents import Residents

#: Ranks of the adapters, in turn.
RANKS = (4, 8, 16)
#: Tokens of a client's prompt, and of the shared prompt that is found again.
PROMPT, SHARED = 32, 400


def save_adapters(model_name: str, folder: Path, count: int) -> list[str]:
    """Write adapters of random values for all linear layers, and return their names."""
    names = [f"adapter{number}" for number in range(count)]
    for number, name in enumerate(names):
        config = LoraConfig(r=RANKS[number % len(RANKS)], target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load_base(model_name, dtype="fp32", device="cpu").model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=0.01)
        model.save_pretrained(folder / name)
    return names


def request(adapter: str | None, prompt: list[int], tokens: int) -> Request:
    """Build a greedy request whose answer does not end early."""
    return Request(prompt, Sampling(temperature=0, max_tokens=tokens, logit_bias={2: -100.0}), adapter)


def new_prompt(count: int) -> list[int]:
    """Return random tokens, which no cache holds."""
    return torch.randint(100, 10_000, (count,)).tolist()


def throughput(engine: Engine, adapters: list[str | None], tokens: int) -> float:
    """Return new tokens a second while a client for each of ``adapters`` waits for its answer."""
    prompts = [new_prompt(PROMPT) for _ in adapters]
    start = time.perf_counter()
    tickets = [engine.submit(request(*given, tokens)) for given in zip(adapters, prompts, strict=True)]
    made = sum(len(ticket.result().tokens) for ticket in tickets)
    return made / (time.perf_counter() - start)


def arrivals(ticket: Ticket) -> list[float]:
    """Return the times at which the tokens of an answer came."""
    return [time.perf_counter() for chunk in ticket if chunk.tokens]


def first_token(engine: Engine, prompt: list[int]) -> float:
    """Return the seconds until an answer's first token."""
    start = time.perf_counter()
    return arrivals(engine.submit(request(None, prompt, 1)))[0] - start


def gaps_while_others_prefill(engine: Engine, tokens: int) -> list[float]:
    """Return the seconds between an answer's tokens while prompts of others are computed."""
    ticket = engine.submit(request(None, new_prompt(PROMPT), tokens))
    others = [engine.submit(request(None, new_prompt(SHARED), 1)) for _ in range(4)]
    times = arrivals(ticket)
    for other in others:
        other.result()
    return [after - before for before, after in itertools.pairwise(times)]


def measure(engine: Engine, names: list[str], rounds: int, tokens: int) -> dict[str, float]:
    """Measure everything in rounds.

    Args:
        engine: The engine, which runs.
        names: Served adapters.
        rounds: Rounds of all contenders.
        tokens: New tokens of each answer.

    Returns:
        Medians of the figures.
    """
    mixes: dict[str, list[str | None]] = {f"{clients} on the base": [None] * clients for clients in (1, 4, 8, 16)}
    mixes[f"8 over {len(names)} adapters"] = [names[number % len(names)] for number in range(8)]
    mixes["8 on one adapter"] = [*names[:1] * 8]
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, adapters in mixes.items():
            figures.setdefault(f"tokens/s, {name}", []).append(throughput(engine, adapters, tokens))
        prompt = new_prompt(SHARED)
        for name in ("cold", "found again"):
            seconds = first_token(engine, [*prompt, *new_prompt(8)])
            figures.setdefault(f"first token, {SHARED} tokens {name}, ms", []).append(1e3 * seconds)
        gaps = sorted(gaps_while_others_prefill(engine, 2 * tokens))
        figures.setdefault("between tokens, median, ms", []).append(1e3 * statistics.median(gaps))
        figures.setdefault("between tokens, p99, ms", []).append(1e3 * gaps[int(0.99 * (len(gaps) - 1))])
    return {name: statistics.median(values) for name, values in figures.items()}


def generate_alone(base: Any, tokens: int) -> float:
    """Return new tokens a second of ``generate`` for one prompt."""
    start = time.perf_counter()
    text = complete(base.model, base.tokenizer, ["The sea and the sky"], max_new_tokens=tokens, greedy=True)[0]
    return len(base.tokenizer(text)["input_ids"]) / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    rounds, tokens = (1, 16) if options.short else (5, 64)
    with tempfile.TemporaryDirectory() as folder:
        names = save_adapters(options.model, Path(folder), options.adapters)
        base = load_base(options.model, dtype="fp32", device="cpu", bits=8)
        residents = Residents(base, folder)
        for name in names:
            residents.load(name)
        engine = Engine(base, residents, make_forward=compiled_forward)
        engine.start()
        throughput(engine, [None, *names], 4)
        figures = measure(engine, names, rounds, tokens)
        engine.stop()
        figures["tokens/s, generate alone"] = generate_alone(base, tokens)
    print(f"forward pass: {type(engine.forward).__name__}")
    show([{"figure": name, "median": value} for name, value in figures.items()])


if __name__ == "__main__":
    main()
