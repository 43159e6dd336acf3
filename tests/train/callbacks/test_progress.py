"""Progress callback: lines of ``metrics.jsonl``, progress bar and progress lines."""

from __future__ import annotations

import sys
import time
from io import StringIO

import pytest

from helpers.tiny_training import tiny_data, tiny_peft
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.train.callbacks import progress
from lorakeet.train.callbacks.progress import ProgressCallback, clock
from lorakeet.train.trainer import Trainer


def train(args, path, collator, **more):
    trainer = Trainer(
        tiny_peft(0.0),
        args,
        train_dataset=tiny_data(),
        data_collator=collator,
        callbacks=[ProgressCallback(path)],
        **more,
    )
    trainer.train()
    return trainer


def test_a_line_for_each_logged_step(make_args, collator, tmp_path):
    path = tmp_path / "metrics.jsonl"
    args = make_args(include_num_input_tokens_seen="non_padding", logging_steps=2, eval_strategy="steps", eval_steps=3)
    trainer = train(args, path, collator, eval_dataset=tiny_data(5, seed=1))
    lines = read_metrics(path)
    learned = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert list(learned[0]) == [
        *("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"),
    ]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [line["loss"] for line in learned] == logged
    # real tokens: 6 steps of 8 samples, 48 of the 64 rows, in the order of the seed
    assert learned[-1]["tokens"] == trainer.state.num_input_tokens_seen < 48 * 17
    first, second = learned[:2]
    rate = (second["tokens"] - first["tokens"]) / (second["seconds"] - first["seconds"])
    assert second["tokens_per_second"] == pytest.approx(rate, rel=0.05)
    assert {"eval_loss", "eval_perplexity", "eval_tokens"} <= set(lines[1])


def test_padding_is_not_counted(make_args, collator, tmp_path):
    args = make_args(include_num_input_tokens_seen="non_padding", max_steps=8)  # one pass over 64 rows
    train(args, tmp_path / "metrics.jsonl", collator)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["tokens"] == sum(map(len, tiny_data()["input_ids"]))


@pytest.mark.parametrize("slow", ["evaluate", "_save"])
def test_evaluating_and_saving_do_not_count_as_training(slow, make_args, collator, tmp_path, monkeypatch):
    real = getattr(Trainer, slow)
    monkeypatch.setattr(Trainer, slow, lambda *args, **kwargs: (time.sleep(0.4), real(*args, **kwargs))[1])
    told = ProgressCallback(tmp_path / "metrics.jsonl")
    strategy = {"evaluate": "eval", "_save": "save"}[slow]
    args = make_args(max_steps=3, **{f"{strategy}_strategy": "steps", f"{strategy}_steps": 1})
    data = {"train_dataset": tiny_data(), "eval_dataset": tiny_data(3)}
    began = time.perf_counter()
    Trainer(tiny_peft(), args, data_collator=collator, callbacks=[told], **data).train()
    assert told.seconds < time.perf_counter() - began - 1.1


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(make_args, collator, tmp_path):
    path = tmp_path / "metrics.jsonl"
    args = make_args(max_steps=6, save_strategy="steps", save_steps=4, include_num_input_tokens_seen="non_padding")
    train(args, path, collator)
    whole = read_metrics(path)
    with path.open("a") as file:
        file.write('{"step": 7, "los')  # the process was killed while it wrote
    told = ProgressCallback(path)
    trainer = Trainer(tiny_peft(0.0), args, train_dataset=tiny_data(), data_collator=collator, callbacks=[told])
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    lines = read_metrics(path)
    same = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens")
    assert [[line[key] for key in same] for line in lines] == [[line[key] for key in same] for line in whole]
    assert lines[3] == whole[3] and lines[4]["seconds"] > lines[3]["seconds"]


def test_without_a_terminal_progress_is_logged_at_intervals(make_args, collator, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="lorakeet")
    train(make_args(include_num_input_tokens_seen="non_padding"), tmp_path / "m.jsonl", collator)
    spoken = [line for line in caplog.messages if line.startswith("step")]
    assert len(spoken) == 1 and spoken[0].startswith("step 6 of 6: loss ") and spoken[0].endswith("0:00 left")
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    caplog.clear()
    train(make_args(include_num_input_tokens_seen="non_padding"), tmp_path / "m.jsonl", collator)
    assert len([line for line in caplog.messages if line.startswith("step")]) == 6


def test_a_terminal_shows_a_bar(make_args, collator, tmp_path, monkeypatch):
    class Terminal(StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    told = ProgressCallback(tmp_path / "m.jsonl")
    args = make_args(include_num_input_tokens_seen="non_padding")
    Trainer(tiny_peft(), args, train_dataset=tiny_data(), data_collator=collator, callbacks=[told]).train()
    told.close()
    assert "6/6" in screen.getvalue() and "tokens/s" in screen.getvalue() and "loss 3." in screen.getvalue()


def test_clock():
    assert [clock(s) for s in (0, 61.4, 3723)] == ["0:00", "1:01", "1:02:03"]


def test_a_long_evaluation_logs_its_progress(make_args, collator, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="lorakeet")
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    args = make_args(max_steps=1, eval_strategy="steps", eval_steps=1)
    train(args, tmp_path / "m.jsonl", collator, eval_dataset=tiny_data(11, seed=1))
    spoken = [line for line in caplog.messages if line.startswith("measuring")]
    assert spoken == [f"measuring the held-out loss: {i} of 3 batches" for i in (1, 2, 3)]
