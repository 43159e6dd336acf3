"""Speed and memory of ``prepare`` on short rows of text: rows a second, seconds of each step, peak resident memory.

Run it on an older checkout by ``PYTHONPATH=CHECKOUT/src``: it uses public names alone, and times the steps where it finds
them.

    python benchmarks/prepare.py --rows 1000000
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Name of a function in ``lorakeet.data.prepare`` -> the step that it is.
STEPS = {"read_rows": "read", "_examine": "examine", "_encode": "encode", "_split": "split", "_report": "report"}


def write_rows(path: Path, count: int, words: list[str]) -> None:
    """Write ``count`` rows of 4 to 12 random words as JSON lines."""
    chance = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"text": " ".join(chance.choices(words, k=chance.randint(4, 12)))}) + "\n")


def train_tokenizer(words: list[str]) -> Any:
    """Train a byte-level BPE in which most of ``words`` are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def time_steps(module: Any) -> dict[str, float]:
    """Wrap the steps of ``module`` in timers; returns the seconds of each, filled in as they run."""
    seconds: dict[str, float] = {}

    def timed(function: Callable[..., Any], step: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - begin

        return run

    for name, step in STEPS.items():
        if hasattr(module, name):
            setattr(module, name, timed(getattr(module, name), step))
    return seconds


def main() -> None:
    """Measure ``prepare`` once, without a cache of tokens, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", action=argparse.BooleanOptionalAction, default=True, help="time the steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORAKEET_HOME"] = folder
        chance = random.Random(0)
        words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 8))) for _ in range(5000)]
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.rows, words)

        from lorakeet.config import DataSettings, TaskSettings

        module = importlib.import_module("lorakeet.data.prepare")
        seconds = time_steps(module) if options.steps else {}
        tokenizer, settings = train_tokenizer(words), DataSettings(path=str(path))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wall, cpu = time.perf_counter(), time.process_time()
        report = module.prepare(settings, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=1).report
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {
        "rows": options.rows,
        "rows_per_second": round(options.rows / wall),
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "steps": {name: round(value, 2) for name, value in seconds.items()},
        "peak_mb": peak // 1024,
        "mb_before": before // 1024,
        "tokens": report.train_tokens + report.held_out_tokens,
    }
    print(json.dumps(figures), file=sys.stdout)


if __name__ == "__main__":
    main()
