"""What a run says of a stream before it is learned, and of rows that turn out broken while it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorakeet.config import DataSettings, TaskName, TaskSettings
from lorakeet.data.prepare import prepare
from lorakeet.data.prepared import Prepared
from lorakeet.errors import DataError

Put = Callable[..., Path]
Streamed = Callable[..., Prepared]
CHAT = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endfor %}"


def sentence(number: int) -> str:
    return f"row {number} of {number * 7 % 13}"


def lines(rows: list[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def streamed(byte_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Prepared]:
    """Prepare a file or folder as a stream."""
    byte_tokenizer.chat_template = CHAT
    byte_tokenizer.cls_token = byte_tokenizer.eos_token

    def make(path: Path, task: TaskName = "CAUSAL_LM", labels: list[str] | None = None, **more: Any) -> Prepared:
        settings = DataSettings(path=str(path), stream=True, **{"shuffle_buffer": 100, "eval_fraction": 0.0, **more})
        return prepare(settings, TaskSettings(type=task, labels=labels), byte_tokenizer, seed=0)

    return make


def test_that_only_the_beginning_was_looked_at_is_said(
    put: Put, streamed: Streamed, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Any] = [{"text": sentence(n)} for n in range(5000)]
    rows[100] = {"text": sentence(3)}
    rows[200] = {"text": " "}
    rows[4000] = {"text": sentence(3)}
    found = streamed(put("a.jsonl", lines(rows))).report
    assert found.checked == 2000 and found.sound == 1999
    assert "checked    only the first 2,000 rows, of which 1,999 can be used" in found.lines()
    assert "1 rows that repeat an earlier one among the first 2,000 rows, such as" in caplog.text
    assert "a.jsonl:101: as" in caplog.text and "1 empty rows among the first 2,000 rows" in caplog.text


def test_every_source_is_looked_at_and_no_more_than_the_limit(
    put: Put, streamed: Streamed, caplog: pytest.LogCaptureFixture
) -> None:
    put("all/a.jsonl", lines([{"text": sentence(n)} for n in range(3000)]))
    folder = put("all/b.jsonl", lines([{"text": f"b {n}"} for n in range(30)] + [{"text": "the cafÃ©"}])).parent
    assert streamed(folder).report.checked == 1031 and "b.jsonl:31: 'Ã©' was 'é' once" in caplog.text
    assert streamed(folder, limit=70).report.checked == 70


@pytest.mark.parametrize(
    ("task", "row", "complaint"),
    [
        ("CAUSAL_LM", {"messages": [{"role": "moderator", "content": "one"}]}, "unknown role among the first 41 rows"),
        ("SEQ_CLS", {"text": "one", "label": "maybe"}, "label 'maybe' is none of the 2 given"),
        (
            "QUESTION_ANS",
            {"question": "what?", "context": "all is well", "answers": {"text": ["well"], "answer_start": [3]}},
            "'well' is not at 3",
        ),
    ],
)
def test_what_would_spoil_the_run_stops_it(
    put: Put, streamed: Streamed, task: TaskName, row: dict[str, Any], complaint: str
) -> None:
    good: Any = {
        "CAUSAL_LM": lambda n: {"messages": [{"role": r, "content": sentence(n)} for r in ("user", "assistant")]},
        "SEQ_CLS": lambda n: {"text": sentence(n), "label": ("yes", "no")[n % 2]},
        "QUESTION_ANS": lambda n: {
            "question": sentence(n),
            "context": sentence(n),
            "answers": {"text": ["row"], "answer_start": [0]},
        },
    }[task]
    rows = [good(n) for n in range(40)]
    labels = ["yes", "no"] if task == "SEQ_CLS" else None
    streamed(put("a.jsonl", lines(rows)), task, labels)
    with pytest.raises(DataError, match=complaint) as caught:
        streamed(put("a.jsonl", lines([*rows, row])), task, labels)
    assert "a.jsonl:41" in caught.value.message and "--fix" in (caught.value.hint or "")


def test_one_label_alone(put: Put, streamed: Streamed, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": sentence(n), "label": "yes" if n < 2500 else "no"} for n in range(3000)]
    streamed(put("a.jsonl", lines(rows)), "SEQ_CLS", ["yes", "no"])
    assert "the first 2,000 rows all have the label 'yes'" in caplog.text and "sorted by label" in caplog.text
    with pytest.raises(DataError, match="one label in all rows"):  # there are no more
        streamed(put("a.jsonl", lines(rows[:50])), "SEQ_CLS", ["yes", "no"])


def test_rows_that_turn_out_broken_later_are_told(
    put: Put, streamed: Streamed, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"text": sentence(n)} for n in range(2500)]
    bad: list[Any] = ["broken", {"text": 7}, {"text": None}, {"text": " "}] * 40
    data = streamed(put("a.jsonl", lines([*good, *bad, *good[:7]])))
    assert data.report.checked == 2000 == data.report.sound and "left out" not in caplog.text
    assert sum(1 for _ in data.train) == 2507
    said = [record.getMessage() for record in caplog.records]
    assert [line.rpartition("/")[2][:13] for line in said if ", left out" in line] == [
        "a.jsonl:2501:",
        "a.jsonl:2502:",
        "a.jsonl:2505:",
    ]
    counts = [int(line.split()[0]) for line in said if "rows left out so far" in line]
    assert len(counts) == 2 and 10 <= counts[0] < 100 <= counts[1] <= 160


def test_broken_rows_at_the_beginning_are_left_out_and_told(
    put: Put, streamed: Streamed, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Any] = ["broken", *({"text": sentence(n)} for n in range(30)), {"text": ["a"]}]
    data = streamed(put("a.jsonl", lines(rows)))
    assert (data.report.checked, data.report.sound) == (32, 30) and len(list(data.train)) == 30
    assert "a.jsonl:1: not JSON" in caplog.text and "a.jsonl:32: column 'text' holds list" in caplog.text


def test_nothing_at_all(put: Put, streamed: Streamed) -> None:
    with pytest.raises(DataError, match="nothing to learn in .*: all rows are empty"):
        streamed(put("a.jsonl", lines([{"text": " "}] * 3)))
