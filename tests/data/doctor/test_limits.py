"""Rows that a base cannot read stop the doctor as they stop a run: tokens without a row, and samples beyond the window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from helpers.tiny_tasks import rows_for, save_tiny, write_rows
from lorakeet.cli import main
from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.prepare import prepare
from lorakeet.errors import DataError
from lorakeet.facts.limits import limits_of

TASKS = {
    "CAUSAL_LM": "llama",
    "SEQ_CLS": "bert",
    "TOKEN_CLS": "bert",
    "FEATURE_EXTRACTION": "bert",
    "SEQ_2_SEQ_LM": "t5",
}


def with_token(row: dict[str, Any], token: str) -> dict[str, Any]:
    """Put a token into the last text of a row."""
    name = [name for name in row if name not in ("label", "tags")][-1]
    value = row[name]
    return {**row, name: [token, *value[1:]] if isinstance(value, list) else f"{value} {token}"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stream", [False, True], ids=["read whole", "streamed"])
def test_a_token_without_row_is_found_with_its_line(
    task: Any, stream: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "base", TASKS[task])
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    rows = rows_for(task, 24)
    rows[16] = with_token(rows[16], "<extra>")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    limits = limits_of(tf.AutoConfig.from_pretrained(folder))
    settings = DataSettings(path=str(path), eval_fraction=0.0, stream=stream)
    chosen = TaskSettings(type=task, labels=["bird", "tool", "food"] if task == "SEQ_CLS" else None)
    if task == "TOKEN_CLS":
        chosen = chosen.model_copy(update={"labels": ["O", "B-bird", "B-tool", "B-food"]})
    if stream:
        data = prepare(settings, chosen, tokenizer, seed=1, vocabulary=limits.rows)
        assert len(list(data.train)) == 23  # left out, and logged
        return
    with pytest.raises(DataError, match=r"rows.jsonl:17: the token '<extra>'"):
        prepare(settings, chosen, tokenizer, seed=1, vocabulary=limits.rows)
    assert main(["doctor", str(path), "--model", str(folder), "--task", task, "--json"]) == 2
    issues = json.loads(capsys.readouterr().out)["findings"]
    assert [issue["count"] for issue in issues if issue["kind"] == "no_row"] == [1]


def test_a_sample_beyond_the_window_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "base", "llama")  # a window of 64 tokens
    path = write_rows(tmp_path / "rows.jsonl", [*rows_for("CAUSAL_LM", 4), {"text": "the old " * 40}])
    words = ["doctor", str(path), "--model", str(folder), "--json"]
    assert main([*words, "--max-length", "80"]) == 2
    issues = json.loads(capsys.readouterr().out)["findings"]
    assert [issue["count"] for issue in issues if issue["kind"] == "too_long"] == [1]
    assert main([*words, "--max-length", "64"]) == 0
