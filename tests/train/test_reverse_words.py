"""An encoder-decoder with random weights learns to reverse words, through LoRA alone; saved, loaded, generated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from helpers.tiny_tasks import FILLERS, NOUNS, save_tiny, write_rows
from lorakeet import PeftModel
from lorakeet.config import make_run
from lorakeet.train.run import run_training


def reversed_words(count: int) -> list[dict[str, str]]:
    """Return distinct rows of two to five words, and the same words in reverse order."""
    chance, rows = random.Random(0), {}
    while len(rows) < count:
        words = chance.choices(NOUNS + FILLERS, k=chance.randint(2, 5))
        rows[" ".join(words)] = " ".join(reversed(words))
    return [{"source": source, "target": target} for source, target in sorted(rows.items())]


def generated(folder: Path, base: Path, sources: list[str]) -> list[str]:
    """Return the texts that the saved adapter generates from the sources."""
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    model: Any = PeftModel.from_pretrained(tf.AutoModelForSeq2SeqLM.from_pretrained(base), folder)
    inputs = tokenizer(sources, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)
    assert ids.eq(tokenizer.eos_token_id).any(1).float().mean() > 0.9  # it ends its texts
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("t5", 2500), ("bart", 1500)])
def test_words_in_reverse(kind: str, steps: int, tmp_path: Path) -> None:
    rows = reversed_words(3200)
    random.Random(1).shuffle(rows)
    base, unseen = save_tiny(tmp_path / "base", kind), rows[3000:]
    run = make_run(
        {
            "base": {"model": str(base), "device": "cpu", "dtype": "fp32"},
            "lora": {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"},
            "data": {"path": str(write_rows(tmp_path / "rows.jsonl", rows[:3000])), "eval_fraction": 0.05},
            "train": {
                "steps": steps,
                "batch_size": 64,
                "grad_accum": 1,
                "lr": 5e-3,
                "warmup": 50,
                "schedule": "cosine",
                "log_every": 250,
            },
            "out": str(tmp_path / "run"),
        }
    )
    summary = run_training(run)
    assert summary["before"]["exact_match"] < 0.05 and summary["after"]["exact_match"] >= 0.95
    answers = generated(tmp_path / "run" / "adapter", base, [row["source"] for row in unseen])
    right = sum(answer == row["target"] for answer, row in zip(answers, unseen, strict=True))
    print(f"{kind}: {right} of {len(unseen)} unseen rows reversed")
    assert right >= 0.95 * len(unseen)
