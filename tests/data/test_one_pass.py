"""Every row passes each step of preparation once: normalized once, converted once to be examined, tokenized once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.kind_rows import HEALTHY
from helpers.task_tokenizers import bpe_tokenizer, wordpiece_tokenizer
from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor import examiner
from lorakeet.data.prepare import prepare
from lorakeet.data.rows import load

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
ROWS = 30


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count normalized records, examined rows, and texts given to the tokenizer."""
    counted: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            return function(*arguments, **options)

        return run

    monkeypatch.setattr(load, "canonical", counting("normalized", load.canonical))
    monkeypatch.setattr(examiner, "hash_inputs", counting("hashed", examiner.hash_inputs))
    return counted


def write(path: Path, task: str, kind: str) -> DataSettings:
    path.write_text("".join(json.dumps(HEALTHY[task, kind](n)) + "\n" for n in range(ROWS)), encoding="utf-8")
    return DataSettings(path=str(path), max_length=999)


@pytest.mark.parametrize(("task", "kind"), HEALTHY)
def test_a_row_is_normalized_and_hashed_once(task: str, kind: str, tmp_path: Path, calls: Counter[str]) -> None:
    tokenizer = wordpiece_tokenizer() if task in ("QUESTION_ANS", "MASKED_LM") else bpe_tokenizer()
    tokenizer.chat_template = CHATML
    report = prepare(write(tmp_path / "rows.jsonl", task, kind), TaskSettings(type=task), tokenizer, seed=1).report
    assert report.rows == ROWS and calls == {"normalized": ROWS, "hashed": ROWS}


@pytest.mark.parametrize(
    ("task", "kind", "texts"),
    [
        ("CAUSAL_LM", "text", 1),
        ("CAUSAL_LM", "completion", 2),
        ("CAUSAL_LM", "messages", 1),
        ("SEQ_CLS", "classes", 1),  # a pair is one call
        ("TOKEN_CLS", "tags", 1),
        ("SEQ_2_SEQ_LM", "translation", 2),
        ("FEATURE_EXTRACTION", "pairs", 3),
        ("MASKED_LM", "text", 1),
    ],
)
def test_a_text_that_is_not_cut_is_tokenized_once(task: str, kind: str, texts: int, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = CHATML
    given: list[int] = []

    class Counting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any = None, *others: Any, text_target: Any = None, **options: Any) -> Any:
            batch = text if text is not None else text_target
            given.append(len(batch) if isinstance(batch, list) else 0)  # single texts are probes of the tokenizer
            return super().__call__(text, *others, text_target=text_target, **options)

    tokenizer.__class__ = Counting
    settings = write(tmp_path / "rows.jsonl", task, kind)
    prepare(settings, TaskSettings(type=task), tokenizer, seed=1)
    assert sum(given) == ROWS * texts
    given.clear()
    prepare(settings, TaskSettings(type=task), tokenizer, seed=1)
    assert sum(given) == 0  # read from the cache
