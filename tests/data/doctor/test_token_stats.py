"""The doctor's figures of samples are those of the run, for every task and kind of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.kind_rows import HEALTHY, sentence
from helpers.task_tokenizers import bpe_tokenizer, wordpiece_tokenizer
from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor.diagnosis import Examination
from lorakeet.data.doctor.examine import examine
from lorakeet.data.prepare import prepare
from lorakeet.data.prepare_report import PrepareReport
from lorakeet.data.rows.kinds import all_kinds

ENCODERS = [(task, kind.name) for kind in all_kinds() for task in kind.encoders]
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"


def tokenizer_for(task: str) -> PreTrainedTokenizerFast:
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS"):
        tokenizer = bpe_tokenizer()  # a word has other tokens at the beginning of a text than after a space
        tokenizer.chat_template = CHATML
        return tokenizer
    return wordpiece_tokenizer()


def both(path: Path, rows: list[Any], task: str, **more: Any) -> tuple[Examination, PrepareReport]:
    """Examine rows, and prepare them for a run."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataSettings(**{"path": str(path), "eval_fraction": 0.0, **more})
    settings = TaskSettings(type=task)
    found = examine(data, settings, tokenizer_for(task))
    return found, prepare(data, settings, tokenizer_for(task), seed=1).report


def test_every_encoder_is_measured() -> None:
    assert HEALTHY.keys() == set(ENCODERS)


@pytest.mark.parametrize("most", [25, 32, 999])
@pytest.mark.parametrize(("task", "kind"), ENCODERS)
def test_tokens_lengths_and_cuts_are_those_of_the_run(task: str, kind: str, most: int, tmp_path: Path) -> None:
    rows = [HEALTHY[task, kind](number) for number in range(25)]
    most *= 2 if task == "CAUSAL_LM" else 1  # a byte a token
    found, report = both(tmp_path / "rows.jsonl", rows, task, max_length=most)
    assert found.kind == report.kind == kind
    assert (found.tokens, found.targets) == (report.train_tokens, report.train_targets)
    assert len(found.lengths) == report.train_samples
    lengths = [min(length, most) for length in found.lengths.values.tolist()]
    assert max(lengths) == report.longest and sum(lengths) == report.train_tokens
    assert found.count("long") == report.cut
    assert (found.count("nothing_learned") > 0) == (report.unlearnable > 0)
    assert found.samples and all(shown.plain for shown in found.samples)
    assert found.usable == report.rows - report.empty == 25


def test_cut_targets_are_those_of_the_run(tmp_path: Path) -> None:
    rows = [{"prompt": "a? ", "completion": sentence(number)} for number in range(9)]
    found, report = both(tmp_path / "rows.jsonl", rows, "CAUSAL_LM", max_length=20)
    assert found.count("truncated") == report.cut == 9 and report.lost > 0
    found, report = both(tmp_path / "rows.jsonl", [*rows, {"prompt": "a" * 30, "completion": "b"}], "CAUSAL_LM")
    assert found.count("truncated") == report.cut == 0


def test_labels_need_not_be_known_before(tmp_path: Path) -> None:
    rows = [{"text": sentence(number), "label": ["x", "y"][: number % 3]} for number in range(9)]
    found, report = both(tmp_path / "rows.jsonl", rows, "SEQ_CLS")
    assert found.targets == report.train_targets == 9 and "labels none" in found.samples[0].plain
    rows = [{"text": sentence(number), "label": number / 2} for number in range(9)]
    found, report = both(tmp_path / "rows.jsonl", rows, "SEQ_CLS")
    assert found.targets == report.train_targets == 9 and "value 0.5" in found.samples[1].plain


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("SEQ_CLS", {"text": "one", "text_pair": None, "label": "tree"}),
        ("FEATURE_EXTRACTION", {"anchor": "one", "positive": "two", "negative": None}),
        ("FEATURE_EXTRACTION", {"anchor": "one", "positive": "two", "negative": " "}),
    ],
)
@pytest.mark.parametrize("at", [0, 5])
def test_a_row_without_its_second_text_is_used_by_neither(task: str, row: Any, at: int, tmp_path: Path) -> None:
    [kind] = [kind for name, kind in HEALTHY if name == task]
    rows = [HEALTHY[task, kind](number) for number in range(10)]
    rows.insert(at, row)
    found, report = both(tmp_path / "rows.jsonl", rows, task)
    assert (found.usable, found.tokens) == (10, report.train_tokens) and report.empty == 1
    assert found.count("null") + found.count("empty") == 1
