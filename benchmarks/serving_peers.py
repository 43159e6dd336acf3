"""Servers beside each other over HTTP: 8 clients with 8 adapters, by Lorakeet, llama.cpp, vLLM on a CPU, and transformers.

Usage::

    python benchmarks/serving_peers.py --llama-server PATH --transformers PATH --vllm PATH   # 4 minutes, on an idle machine
    python benchmarks/serving_peers.py --short ...                                           # to see it run

Each server is a process that sleeps (SIGSTOP) while another one is measured. A short round that is not timed wakes it, since
a machine may take its pages away meanwhile. Rounds of all contenders alternate, and medians count. Every client streams a
greedy answer of 64 tokens to a text of 32 tokens. All contenders get the same texts, with the same adapters of ranks 4, 8 and
16 on all linear layers. transformers serves no adapters, so it gets the bare base. A peer that is not given, or does not
start, is left out with the reason.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8 import show
from lorakeet import api, load_base
from lorakeet.base.source import find_source, local_folder
from lorakeet.config import DEFAULT_MODEL, BaseSettings
from lorakeet.export.gguf.files import write_model
from peer_servers import CLIENTS, Server, llama_server, lorakeet_server, transformers_server, vllm_server
from serving import save_adapters

#: Tokens of each prompt.
PROMPT = 32
#: Seconds that a server may take to answer.
ANSWER = 120


@dataclass
class Answer:
    """A streamed answer: when it was asked for, and when its pieces came."""

    asked: float
    pieces: list[float]
    tokens: int


def ask(server: Server, body: dict[str, Any]) -> Answer:
    """Stream an answer.

    Raises:
        RuntimeError: The server answers with an error.
    """
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER)
    asked, pieces, tokens, line = time.perf_counter(), [], 0, b""
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{server.name}: status {answer.status}: {answer.read()[:500]!r}")
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("choices") and event["choices"][0].get("text"):
            pieces.append(time.perf_counter())
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    connection.close()
    if not pieces or not tokens:
        raise RuntimeError(f"{server.name}: an answer without tokens: {line!r}")
    return Answer(asked, pieces, tokens)


def ask_together(server: Server, adapters: Sequence[int | None], texts: Sequence[str], tokens: int) -> list[Answer]:
    """Let a client for each of ``adapters`` ask at the same time, and return the answers.

    Args:
        server: The server, which runs.
        adapters: Each client's adapter; None: the base.
        texts: Each client's text.
        tokens: New tokens of each answer.

    Raises:
        RuntimeError: An answer failed.
    """
    answers: list[Answer] = []
    errors: list[Exception] = []

    def client(adapter: int | None, text: str) -> None:
        try:
            answers.append(ask(server, server.body(adapter, text, tokens)))
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=given) for given in zip(adapters, texts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"{server.name}: {len(errors)} of {len(threads)} answers failed: {errors[0]!r}")
    return answers


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the figures of one round of one contender."""
    begin, end = min(one.asked for one in answers), max(one.pieces[-1] for one in answers)
    gaps = sorted(after - before for one in answers for before, after in itertools.pairwise(one.pieces))
    return {
        "tokens/s": sum(one.tokens for one in answers) / (end - begin),
        "first token, ms": 1e3 * statistics.median(one.pieces[0] - one.asked for one in answers),
        "gap p50, ms": 1e3 * statistics.median(gaps),
        "gap p99, ms": 1e3 * gaps[int(0.99 * (len(gaps) - 1))],
    }


def texts_of(tokenizer: Any, count: int, random_of: random.Random) -> list[str]:
    """Return different texts of exactly :data:`PROMPT` tokens, which no cache of prompts has."""
    texts: list[str] = []
    while len(texts) < count:
        text = tokenizer.decode([random_of.randrange(1000, 10_000) for _ in range(PROMPT)])
        if text.isascii() and len(tokenizer(text)["input_ids"]) == PROMPT:
            texts.append(text)
    return texts


def servers(options: argparse.Namespace, folder: Path) -> tuple[list[Server], Any]:
    """Write bases and adapters in all formats; return the servers of the programs that were given, and the tokenizer."""
    base = local_folder(find_source(DEFAULT_MODEL))
    adapters = folder / "adapters"
    names = save_adapters(str(base), adapters, CLIENTS)
    loaded = load_base(str(base), dtype="fp32", device="cpu")
    ends = loaded.model.generation_config.eos_token_id
    found = [lorakeet_server(base, adapters, ends if isinstance(ends, list) else [ends])]
    if options.llama_server:
        write_model(folder / "base.gguf", loaded.model, loaded.tokenizer, "base", "q8_0", "smollm")
        for name in names:
            api.export(str(adapters / name), "gguf", str(folder / "gguf" / name), BaseSettings(model=str(base)))
        converted = [folder / "gguf" / name / "adapter.gguf" for name in names]
        found.append(llama_server(options.llama_server, folder / "base.gguf", converted))
    if options.vllm:
        found.append(vllm_server(options.vllm, base, adapters))
    if options.transformers:
        found += [
            transformers_server(options.transformers, base),
            transformers_server(options.transformers, base, "--continuous-batching"),
        ]
    return found, loaded.tokenizer


def contenders(running: Sequence[Server]) -> dict[str, tuple[Server, list[int | None]]]:
    """Return each contender's name, server and adapters of its clients."""
    found: dict[str, tuple[Server, list[int | None]]] = {}
    for server in running:
        if not server.name.startswith("transformers"):
            found[f"{server.name}, {CLIENTS} adapters"] = (server, list(range(CLIENTS)))
        found[f"{server.name}, bare base"] = (server, [None] * CLIENTS)
    return found


def measure(running: Sequence[Server], tokenizer: Any, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Measure all contenders in rounds; return a row for each, with medians.

    Args:
        running: Servers, which sleep.
        tokenizer: Tokenizer of the base.
        rounds: Rounds, each after one of 8 tokens that warms up.
        tokens: New tokens of each answer.
    """
    random_of = random.Random(0)
    entered = contenders(running)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        texts = texts_of(tokenizer, CLIENTS, random_of)
        for name, (server, adapters) in list(entered.items()):
            server.signal(signal.SIGCONT)
            try:
                ask_together(server, adapters, texts_of(tokenizer, CLIENTS, random_of), 8)  # its memory may be cold
                answers = ask_together(server, adapters, texts, tokens)
            except RuntimeError as error:
                print(f"left out: {name}: {error}", flush=True)
                del entered[name]
                continue
            finally:
                resident = server.resident_mb()
                server.signal(signal.SIGSTOP)
            found.setdefault(name, []).append({**figures(answers), "MB": resident})
    rows = [
        {"contender": name, **{key: statistics.median(one[key] for one in taken) for key in taken[0]}}
        for name, taken in found.items()
    ]
    return [{**row, "Lorakeet's times": rows[0]["tokens/s"] / row["tokens/s"]} for row in rows]


def main() -> None:
    """Start the servers, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", help="path of llama.cpp's llama-server")
    parser.add_argument("--vllm", help="path of vLLM's command, of a build for CPUs")
    parser.add_argument("--transformers", help="path of transformers' command, with its extra `serving`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one round of 16 tokens")
    options = parser.parse_args()
    rounds, tokens = (1, 16) if options.short else (options.rounds, 64)
    running: list[Server] = []
    folder = Path(tempfile.mkdtemp())
    try:
        found, tokenizer = servers(options, folder)
        for server in found:
            reason = server.start(folder)
            if reason is None:
                server.signal(signal.SIGSTOP)
                running.append(server)
            else:
                print(f"left out: {server.name}: {reason}", flush=True)
        rows = measure(running, tokenizer, rounds, tokens)
    finally:
        for server in running:
            server.stop()
        shutil.rmtree(folder)
    show(rows)


if __name__ == "__main__":
    main()
