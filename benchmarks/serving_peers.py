"""Servers beside each other over HTTP: 8 clients with 8 adapters, by Lorakeet, llama.cpp, vLLM on a CPU, and transformers.

Usage::

    python benchmarks/serving_peers.py --llama-server PATH --transformers PATH --vllm PATH   # 4 minutes, on an idle machine
    python benchmarks/serving_peers.py --short ...                                           # to see it run

Each server is a process that sleeps (SIGSTOP) while another one is measured; rounds of all contenders alternate, and medians
count. Every client streams a greedy answer of 64 tokens to a text of 32 tokens. All contenders get the same texts, with the
same adapters of ranks 4, 8 and 16 on all linear layers. transformers serves no adapters, so it gets the bare base. A peer
that is not given, or does not start, is left out with the reason.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8 import show
from lorakeet import api, load_base
from lorakeet.base.source import find_source, local_folder
from lorakeet.config import DEFAULT_MODEL, BaseSettings
from lorakeet.export.gguf.files import write_model
from serving import save_adapters

#: Clients that ask together, each with its own adapter.
CLIENTS = 8
#: Tokens of each prompt.
PROMPT = 32
#: Threads of each server.
THREADS = os.cpu_count() or 1
#: Seconds that a server may take to start, and to answer.
START, ANSWER = 240, 120
#: Body of a request by (adapter's number or None, text, tokens).
MakeBody = Callable[[int | None, str, int], dict[str, Any]]


@dataclass
class Server:
    """A server's process: its own group, so that its workers sleep and end with it.

    Attributes:
        name: Shown name.
        words: Command line, with ``PORT`` for the port.
        ready: Path that answers with status 200 once requests are taken.
        body: Maker of a request's body.
        environment: Further variables of its process.
    """

    name: str
    words: list[str]
    ready: str
    body: MakeBody
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self, folder: Path) -> str | None:
        """Start the process and wait until it is ready; return the reason if it is not."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        log = folder / f"{self.name}.log"
        words = [word.replace("PORT", str(self.port)) for word in self.words]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                words, stdout=out, stderr=out, env={**os.environ, **self.environment}, start_new_session=True
            )
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            if self._is_ready():
                return None
            time.sleep(0.2)
        self.stop()
        return f"`{' '.join(words)}` is not ready:\n{log.read_text(errors='replace')[-1500:]}"

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", self.ready)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and its workers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def resident_mb(self) -> float:
        """Return the resident memory of the process and its workers in MB, shared pages once (Linux)."""
        assert self.process is not None
        total = 0
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and os.getpgid(int(folder.name)) == self.process.pid:
                    lines = (folder / "smaps_rollup").read_text(encoding="ascii").splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except OSError:
                continue
        return total / 1024

    def stop(self) -> None:
        """End the process and its workers."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        if self.process is not None:
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.process.wait()


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
    asked, pieces, tokens = time.perf_counter(), [], 0
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


def common(model: str, text: str, tokens: int) -> dict[str, Any]:
    """Return the fields of a body that all servers know."""
    return {
        "model": model,
        "prompt": text,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def lorakeet_server(base: Path, adapters: Path, ends: Sequence[int]) -> Server:
    """Return Lorakeet's server, with the base in 8 bits."""

    def body(adapter: int | None, text: str, tokens: int) -> dict[str, Any]:
        model = "base" if adapter is None else f"adapter{adapter}"
        return common(model, text, tokens) | {"logit_bias": {str(end): -100 for end in ends}}

    words = [sys.executable, "-m", "lorakeet", "serve", "--model", str(base), "--name", "base", "--bits", "8"]
    return Server("lorakeet", [*words, "--adapters", str(adapters), "--port", "PORT"], "/ready", body)


def llama_server(program: str, gguf: Path, adapters: Sequence[Path]) -> Server:
    """Return llama.cpp's server at Q8_0."""

    def body(adapter: int | None, text: str, tokens: int) -> dict[str, Any]:
        scales = [{"id": number, "scale": float(number == adapter)} for number in range(len(adapters))]
        return common("base", text, tokens) | {"ignore_eos": True, "cache_prompt": False, "lora": scales}

    words = [program, "-m", str(gguf), "--parallel", str(CLIENTS), "-c", str(512 * CLIENTS), "-t", str(THREADS)]
    for adapter in adapters:
        words += ["--lora", str(adapter)]
    return Server("llama.cpp", [*words, "--lora-init-without-apply", "--port", "PORT"], "/health", body)


def vllm_server(program: str, base: Path, adapters: Path) -> Server:
    """Return vLLM's server on a CPU, in bf16, its usual format there."""

    def body(adapter: int | None, text: str, tokens: int) -> dict[str, Any]:
        return common("base" if adapter is None else f"adapter{adapter}", text, tokens) | {"ignore_eos": True}

    words = [program, "serve", str(base), "--served-model-name", "base", "--port", "PORT", "--dtype", "bfloat16"]
    words += ["--max-model-len", "512", "--max-num-seqs", str(CLIENTS), "--enable-lora", "--max-lora-rank", "16"]
    words += ["--max-loras", str(CLIENTS), "--no-enable-prefix-caching", "--lora-modules"]
    words += [f"{one.name}={one}" for one in sorted(adapters.iterdir())]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "HF_HUB_OFFLINE": "1"}
    return Server("vLLM", words, "/health", body, settings)


def transformers_server(program: str, base: Path, *options: str) -> Server:
    """Return transformers' server; it takes no list of stop tokens but a whole configuration of the generation."""

    def body(adapter: int | None, text: str, tokens: int) -> dict[str, Any]:
        generation = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 2}
        return common(str(base), text, tokens) | {"generation_config": json.dumps(generation)}

    name = " ".join(["transformers", *options])
    words = [program, "serve", str(base), "--port", "PORT", "--device", "cpu", *options]
    return Server(name, words, "/health", body, {"HF_HUB_OFFLINE": "1"})


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
        rounds: Rounds after one that warms up.
        tokens: New tokens of each answer.
    """
    random_of = random.Random(0)
    entered = contenders(running)
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds + 1):
        texts = texts_of(tokenizer, CLIENTS, random_of)
        for name, (server, adapters) in list(entered.items()):
            server.signal(signal.SIGCONT)
            try:
                answers = ask_together(server, adapters, texts, tokens if number else 8)
            except RuntimeError as error:
                print(f"left out: {name}: {error}", flush=True)
                del entered[name]
                continue
            finally:
                resident = server.resident_mb()
                server.signal(signal.SIGSTOP)
            if number:
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
