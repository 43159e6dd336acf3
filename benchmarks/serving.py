"""Throughput and latency of the server's engine, without HTTP; and the seconds until a server is ready.

Usage::

    python benchmarks/serving.py            # a few minutes, on an idle machine
    python benchmarks/serving.py --short    # half a minute, to see it run
    python benchmarks/serving.py --clients 1 2 4 8 16 --picture docs/images/serving.png

One process with a base in 8 bits and adapters of random values, and a second engine without any. Rounds of all contenders
alternate, and medians count.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
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
#: Tokens of an answer that lasts longer than the loads beside it; eight have room in the cache at once.
LONGEST = 2000


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


def request(adapter: str | None, prompt: list[int], tokens: int, **settings: Any) -> Request:
    """Build a request, greedy unless the settings say otherwise, whose answer does not end early."""
    chosen = {"temperature": 0.0, "ignore_end": True, "max_tokens": tokens, **settings}
    return Request(prompt, Sampling(**chosen), adapter)


def new_prompt(count: int) -> list[int]:
    """Return random tokens, which no cache holds."""
    return torch.randint(100, 10_000, (count,)).tolist()


def throughput(engine: Engine, adapters: list[str | None], tokens: int, **settings: Any) -> float:
    """Return new tokens a second while a client for each of ``adapters`` waits for its answer."""
    prompts = [new_prompt(PROMPT) for _ in adapters]
    start = time.perf_counter()
    tickets = [engine.submit(request(*given, tokens, **settings)) for given in zip(adapters, prompts, strict=True)]
    made = sum(len(ticket.result().tokens) for ticket in tickets)
    return made / (time.perf_counter() - start)


def arrivals(ticket: Ticket) -> list[float]:
    """Return the times at which the tokens of an answer came."""
    return [time.perf_counter() for chunk in ticket if chunk.tokens]


def first_token(engine: Engine, prompt: list[int]) -> float:
    """Return the seconds until an answer's first token."""
    start = time.perf_counter()
    return arrivals(engine.submit(request(None, prompt, 1)))[0] - start


def gaps(engine: Engine, tokens: int, others: int = 0) -> list[float]:
    """Return the sorted seconds between an answer's tokens, while prompts of others are computed."""
    ticket = engine.submit(request(None, new_prompt(PROMPT), tokens))
    tickets = [engine.submit(request(None, new_prompt(SHARED), 1)) for _ in range(others)]
    times = arrivals(ticket)
    for other in tickets:
        other.result()
    return sorted(after - before for before, after in itertools.pairwise(times))


def loads_beside(engine: Engine, names: list[str], streams: int) -> tuple[list[float], list[float]]:
    """Return the seconds of loads under a further name, and those between the tokens of each of some answers meanwhile."""
    tickets = [engine.submit(request(None, new_prompt(PROMPT), LONGEST)) for _ in range(streams)]
    times: list[list[float]] = [[] for _ in tickets]
    for ticket, own in zip(tickets, times, strict=True):
        ticket.listen(lambda chunk, own=own: own.append(time.perf_counter()) if chunk.tokens else None)
    while not all(times):
        time.sleep(0.01)
    seconds, began = [], time.perf_counter()
    for name in names:
        start = time.perf_counter()
        engine.residents.load("again", name)
        seconds.append(time.perf_counter() - start)
        engine.residents.unload("again")
    for ticket in tickets:
        ticket.cancel()
    for ticket in tickets:
        ticket.result()
    between = [after - before for own in times for before, after in itertools.pairwise(own) if after > began]
    return seconds, between


def measure(engine: Engine, bare: Engine, names: list[str], rounds: int, tokens: int) -> dict[str, float]:
    """Measure everything in rounds.

    Args:
        engine: The engine with adapters, which runs.
        bare: An engine without, which runs too.
        names: Served adapters.
        rounds: Rounds of all contenders.
        tokens: New tokens of each answer.

    Returns:
        Medians of the figures.
    """
    mixes: dict[str, list[str | None]] = {f"{clients} on the base": [None] * clients for clients in (1, 4, 8, 16)}
    mixes[f"8 over {len(names)} adapters"] = [names[number % len(names)] for number in range(8)]
    mixes["8 on one adapter"] = [*names[:1] * 8]
    drawn = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    for _ in range(rounds):
        for name, adapters in mixes.items():
            note(f"tokens/s, {name}", throughput(engine, adapters, tokens))
        note("tokens/s, 8 on the base, no adapter loaded", throughput(bare, [None] * 8, tokens))
        note("tokens/s, 8 on the base, temperature 0.8, top_p 0.95", throughput(engine, [None] * 8, tokens, **drawn))
        prompt = new_prompt(SHARED)
        for name in ("cold", "found again"):
            seconds = first_token(engine, [*prompt, *new_prompt(8)])
            note(f"first token, {SHARED} tokens {name}, ms", 1e3 * seconds)
        note("between tokens, alone, median, ms", 1e3 * statistics.median(gaps(engine, tokens)))
        between = gaps(engine, 4 * tokens, others=4)
        note("between tokens, others prefill, median, ms", 1e3 * statistics.median(between))
        note("between tokens, others prefill, p99, ms", 1e3 * between[int(0.99 * (len(between) - 1))])
        for streams in (1, 8):
            loads, between = loads_beside(engine, names, streams)
            note(f"load beside {streams}, ms", 1e3 * statistics.median(loads))
            note(f"between tokens of {streams}, adapters are loaded, median, ms", 1e3 * statistics.median(between))
            note(f"between tokens of {streams}, adapters are loaded, longest, ms", 1e3 * max(between))
    return {name: statistics.median(values) for name, values in figures.items()}


def against_clients(
    engine: Engine, names: list[str], clients: list[int], rounds: int, tokens: int
) -> dict[str, list[float]]:
    """Measure the throughput of each number of clients, on the base and over all adapters.

    Args:
        engine: The engine, which runs.
        names: Served adapters.
        clients: Numbers of clients.
        rounds: Rounds of all contenders.
        tokens: New tokens of each answer.

    Returns:
        For each line, the median tokens/s of each number of clients.
    """
    lines = {"the base": [None], f"{len(names)} adapters": names}
    found: dict[str, list[list[float]]] = {label: [[] for _ in clients] for label in lines}
    for _ in range(rounds):
        for index, count in enumerate(clients):
            for label, kinds in lines.items():
                adapters = [kinds[number % len(kinds)] for number in range(count)]
                found[label][index].append(throughput(engine, adapters, tokens))
    return {label: [statistics.median(values) for values in line] for label, line in found.items()}


def draw(clients: list[int], lines: dict[str, list[float]], path: Path) -> None:
    """Draw tokens per second against clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    for (label, line), colour, mark in zip(lines.items(), ("#08519c", "#d94801"), "os", strict=True):
        ax.plot(clients, line, color=colour, marker=mark, markersize=5, label=label)
    ax.plot(
        clients, [lines["the base"][0] * count / clients[0] for count in clients], ":", color="#595959", linewidth=1
    )
    ax.set_ylim(0, 1.15 * max(max(line) for line in lines.values()))
    ax.set_xticks(clients)
    ax.set_xlabel("clients at the same time (dotted: in proportion)")
    ax.set_ylabel("new tokens per second")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    figure.suptitle("SmolLM2-135M in 8 bits", x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=150)


def generate_alone(base: Any, tokens: int) -> float:
    """Return new tokens a second of ``generate`` for one prompt."""
    start = time.perf_counter()
    text = complete(base.model, base.tokenizer, ["The sea and the sky"], max_new_tokens=tokens, greedy=True)[0]
    return len(base.tokenizer(text)["input_ids"]) / (time.perf_counter() - start)


def command(*words: str) -> list[str]:
    """Return the command line of a process of lorakeet."""
    return [sys.executable, "-c", "from lorakeet.cli import script; script()", *words]


def ready(converted: Path, adapters: Path) -> float:
    """Return the seconds from the start of a server until it takes requests.

    Python may keep its bytecode, as on any machine where the server has run before.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = command("serve", "--model", str(converted), "--adapters", str(adapters), "--port", str(port))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").close()
                    return time.perf_counter() - start
                time.sleep(0.01)
        finally:
            server.terminate()
    raise RuntimeError(f"the server ended with status {server.returncode}")


def measure_ready(model: str, adapters: Path, rounds: int) -> float:
    """Return the median seconds until a server of a converted base is ready, after a first start."""
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, "converted")
        subprocess.run(command("quantize", "--model", model, "--out", str(converted)), check=True, capture_output=True)
        return statistics.median([ready(converted, adapters) for _ in range(rounds + 1)][1:])


def started(model: str, folder: Path, names: list[str]) -> tuple[Any, Engine]:
    """Return a base in 8 bits with a running engine that serves these adapters."""
    base = load_base(model, dtype="fp32", device="cpu", bits=8)
    residents = Residents(base, folder)
    engine = Engine(base, residents, make_forward=compiled_forward)
    for name in names:
        residents.load(name)
    engine.start()
    throughput(engine, [None, *names], 4)
    return base, engine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of an answer")
    parser.add_argument("--short", action="store_true", help="one round of 16 tokens")
    parser.add_argument("--clients", type=int, nargs="+", help="measure the throughput of these alone")
    parser.add_argument("--picture", type=Path, help="draw that of --clients into this file")
    options = parser.parse_args()
    rounds, tokens = (1, 16) if options.short else (5, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        names = save_adapters(options.model, Path(folder), options.adapters)
        if not options.clients:
            until_ready = measure_ready(options.model, Path(folder), rounds)
        base, engine = started(options.model, Path(folder), names)
        print(f"forward pass: {type(engine.forward).__name__}")
        if options.clients:
            lines = against_clients(engine, names, options.clients, rounds, tokens)
            show([{"clients": n, **{k: line[i] for k, line in lines.items()}} for i, n in enumerate(options.clients)])
            if options.picture:
                draw(options.clients, lines, options.picture)
        else:
            _, bare = started(options.model, Path(folder), [])
            figures = measure(engine, bare, names, rounds, tokens)
            bare.stop()
            figures["ready with a converted base, s"] = until_ready
            figures["tokens/s, generate alone"] = generate_alone(base, tokens)
            show([{"figure": name, "median": value} for name, value in figures.items()])
        engine.stop()


if __name__ == "__main__":
    main()
