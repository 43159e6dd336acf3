"""Under several processes all react alike to a step at fault, and the samples of each process are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.processes import RUN, launch, settings
from helpers.tiny_training import tiny_tokenizer
from lorakeet.runs.metrics_log import read_metrics

pytestmark = pytest.mark.slow


def test_two_processes_stop_and_skip_together(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RUN)
    stops, skips = settings(tmp_path, "stops"), settings(tmp_path, "skips", non_finite="skip")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny_tokenizer().convert_tokens_to_ids("rain")] = float("nan")
    model.save_pretrained(tmp_path / "base")
    lines = [f"a bird sings the {word} song {word}" for word in ("green", "one", "parrot", "its") for _ in range(20)]
    lines[33] = "then the rain falls"
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = launch(script, str(stops))
    assert done.returncode and "is not finite; the step was not applied" in done.stderr, done.stderr[-3000:]
    assert f"{tmp_path}/texts.txt:34: 5 tokens" in done.stderr and ", micro-batch " in done.stderr
    done = launch(script, str(skips))
    assert done.returncode == 0 and done.stderr.count("step skipped") == 1, done.stderr[-3000:]
    steps = [line["step"] for line in read_metrics(tmp_path / "skips" / "metrics.jsonl") if "loss" in line]
    assert steps[-1] == 6
