"""Servers of Lorakeet, llama.cpp, vLLM and transformers as processes, for serving_peers.py: commands, readiness, bodies."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Clients that ask together, each with its own adapter.
CLIENTS = 8
#: Threads of each server.
THREADS = os.cpu_count() or 1
#: Seconds that a server may take to start.
START = 240
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
