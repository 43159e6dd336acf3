"""The metrics log: read, appended, summarized."""

from __future__ import annotations

import json
import math

from helpers.disk import files_of_at_most
from lorakeet.runs.metrics_log import MetricsLog, append_metrics, first_and_last, read_metrics


def test_first_and_last_are_means_of_a_few():
    lines = [{"step": i, "loss": float(i)} for i in range(100)] + [{"step": 99, "eval_loss": 5.0}]
    assert first_and_last(lines) == (4.5, 94.5)
    assert first_and_last(lines[:10]) == (0.5, 8.5)
    assert first_and_last(lines[:3]) == (0.0, 2.0)
    assert all(math.isnan(value) for value in first_and_last([]))


def test_metrics_are_one_object_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    append_metrics(path, {"step": 1, "loss": 2.0})
    append_metrics(path, {"step": 2, "loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_line_that_a_crash_truncated_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_a_line_that_the_disk_refuses_is_written_with_a_later_one(tmp_path, caplog):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    before = log.path.read_bytes()
    with files_of_at_most(len(before) + 5):
        log.append({"step": 2, "loss": 1.5})
        log.append({"step": 3, "loss": 1.0})
        assert log.path.read_bytes() == before
        assert [line["step"] for line in log.read()] == [1, 2, 3]
    assert caplog.text.count("tried again") == 1
    log.append({"step": 4})
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3, 4]
    log.replace(log.read()[:2])
    assert read_metrics(log.path) == [{"step": 1}, {"step": 2, "loss": 1.5}]
