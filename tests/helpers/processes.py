"""Launch a training in several processes: by torchrun, or in a second as copies of a process that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from helpers.tiny_training import WORDS, tiny_llama, tiny_tokenizer
from lorakeet.config import make_run

RUN = """
import sys
from lorakeet.config import read_run
from lorakeet.train.run import run_training
run_training(read_run(sys.argv[1]), **dict.fromkeys(sys.argv[2:], True))
"""


def launch(script: Path, *words: str, processes: int = 2) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def settings(tmp_path: Path, name: str, bits: int | None = None, **train) -> Path:
    base = tmp_path / "base"
    if not base.exists():
        tiny_llama(initializer_range=0.2).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        words = len(WORDS)
        lines = [
            " ".join(WORDS[(i * k) % words] for k in range(1, 3 + i % 9)) + f" {WORDS[i % words]}" for i in range(83)
        ]
        (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = make_run(
        {
            "base": {"model": str(base), "device": "cpu", "dtype": "fp32", "bits": bits},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            "data": {"path": str(tmp_path / "texts.txt"), "eval_fraction": 0.23},
            "train": {"steps": 6, "batch_size": 2, "grad_accum": 2, "lr": 0.05, "eval_every": 3, **train},
            "out": str(tmp_path / name),
        }
    )
    file = tmp_path / f"{name}.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Outcome:
    """End of one process.

    Attributes:
        result: What the function returned.
        error: Text of the error that it raised; None if it returned.
        exit_code: Exit code of the process.
    """

    result: Any
    error: str | None
    exit_code: int | None


def in_processes(function: Callable[..., Any], *args: Any, processes: int = 2, seconds: float = 60.0) -> list[Outcome]:
    """Call ``function(*args)`` in several processes that find each other as under torchrun; return how each ended.

    Args:
        function: A function of a module; it is imported in each process.
        args: Its arguments.
        processes: Number of processes.
        seconds: Time after which processes that still run are killed, with the exit code -9.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorakeet.train.run"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        receive, send = context.Pipe(duplex=False)
        environment = {
            **os.environ,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        process = context.Process(target=_call, args=(send, environment, function, args))
        process.start()
        send.close()
        started.append((process, receive))
    wait([process.sentinel for process, _ in started], seconds)
    return [_outcome(process, receive, seconds) for process, receive in started]


def _call(send: Any, environment: dict[str, Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    import torch
    from accelerate import PartialState

    torch.set_num_threads(1)
    PartialState._reset_state()  # the process that was copied is alone
    try:
        answer = (function(*args), None)
    except BaseException as error:
        answer = (None, f"{type(error).__name__}: {error}")
    send.send(answer)


def _outcome(process: Any, receive: Any, seconds: float) -> Outcome:
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    try:
        result, error = receive.recv() if receive.poll() else (None, "no answer")
    except EOFError:
        result, error = None, "no answer"
    return Outcome(result, error, process.exitcode)
