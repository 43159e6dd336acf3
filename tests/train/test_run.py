"""A complete run on a tiny base: its files, refused settings, interruption and resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer, TrainerCallback

from helpers.tiny_tasks import rows_for, save_tiny, write_rows
from helpers.tiny_training import WORDS
from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.load import inspect_model, load_base
from lorakeet.config import TaskSettings, make_run, read_run
from lorakeet.data.collate import PaddingCollator
from lorakeet.data.prepare import prepare
from lorakeet.errors import BaseModelError, DataError, OutputError, TargetError, TrainingError
from lorakeet.patches import of_training
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.tasks import setup
from lorakeet.train import run as module
from lorakeet.train import run_output
from lorakeet.train.callbacks import interrupt as stop_module
from lorakeet.train.callbacks.interrupt import StopAfterStep
from lorakeet.train.callbacks.progress import ProgressCallback
from lorakeet.train.evaluate import evaluate
from lorakeet.train.run import InterruptedRunError, run_training


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_writes_adapter_metrics_summary_and_loss_curve(settings, tmp_path, base_folder, capfd, caplog):
    caplog.set_level("INFO", logger="lorakeet")
    config = settings(train__eval_every=3)
    summary = run_training(config)
    out = tmp_path / "run"
    assert files(out) == {"run.yaml", "metrics.jsonl", "summary.json", "loss_curve.png", "ranks.png", "adapter"}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (
        summary["steps"] == 6
        and summary["samples"] == summary["data"]["train_samples"] < 48
        and summary["processes"] == 1
    )
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["train_loss_last"] < summary["train_loss_first"]
    assert summary["trainable_parameters"] == 2 * 4 * (2 * 32 + 32 + 16)
    assert summary["base_model"] == str(base_folder) and summary["adapter_path"] == str(out / "adapter")
    assert summary["peak_rss_bytes"] > 1e8 and 0 < summary["train_seconds"] < summary["wall_seconds"]
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["train_seconds"])
    assert {"python", "lorakeet", "torch", "transformers", "C loops"} == set(summary["versions"])
    lines = read_metrics(out / "metrics.jsonl")
    assert sum("spectrum" in line for line in lines) == 2
    lines = [line for line in lines if "spectrum" not in line]
    assert [(line["step"], "loss" in line) for line in lines] == [
        *((0, False), (1, True), (2, True), (3, True), (3, False)),
        *((4, True), (5, True), (6, True), (6, False)),
    ]
    assert lines[-2]["tokens"] == summary["tokens"]
    assert capfd.readouterr().out == ""
    for said in (
        "896 of 22,048",
        "rows       60",
        "a sample ",
        "is given, not learned",
        "6 steps of 8 samples",
        "held-out",
    ):
        assert said in caplog.text, said

    # the adapter on disk gives the loss of the summary, with its own tokenizer and chat template
    base = load_base(config.base)
    model = PeftModel.from_pretrained(base.model, out / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    held_out = prepare(config.data, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=42).held_out
    again = evaluate(model, held_out, PaddingCollator(0), 4)
    assert again["loss"] == pytest.approx(summary["eval_loss_after"], abs=1e-5)
    assert again["tokens"] == summary["eval_tokens"]
    assert tokenizer.chat_template
    notes = json.loads((out / "adapter" / "lorakeet.json").read_text())
    assert notes["eval_loss_after"] == summary["eval_loss_after"] and notes["data"] == summary["data"]["content_hash"]


def test_the_adapter_is_written_once(settings, tmp_path, monkeypatch):
    written = []
    real = PeftModel.save_pretrained

    def counting(self, folder, **more):
        written.append(Path(folder).name)
        return real(self, folder, **more)

    monkeypatch.setattr(PeftModel, "save_pretrained", counting)
    run_training(settings(train__save_minutes=0))
    assert len(written) == 1 and "adapter" in written[0]


@pytest.mark.parametrize("failing", ["summarize", "add_notes"])
def test_an_adapter_survives_an_error_after_the_training(failing, settings, tmp_path, monkeypatch):
    """Its figures are lost; its weights are those of a run without the error."""
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    run_training(settings())
    whole = weights.read_bytes()

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(run_output, failing, fail)
    with pytest.raises(MemoryError):
        run_training(settings(), overwrite=True)
    assert weights.read_bytes() == whole
    assert "eval_loss_after" not in json.loads((tmp_path / "run" / "adapter" / "lorakeet.json").read_text())
    assert not (tmp_path / "run" / "summary.json").exists()


def test_run_yaml_alone_repeats_the_run(settings, tmp_path):
    run_training(settings())
    first = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    written = read_run(tmp_path / "run" / "run.yaml")
    assert written == settings()
    assert set(yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["train"]) == set(
        type(written.train).model_fields
    )
    run_training(written, overwrite=True)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == first


def test_epochs_without_a_held_out_part(settings):
    summary = run_training(settings(train__steps=None, train__epochs=2.0, data__eval_fraction=0.0, train__eval_every=2))
    assert summary["samples"] == 2 * summary["data"]["train_samples"] == 2 * 60
    assert summary["steps"] == 2 * 8  # 7 steps of 8 samples and one of 4
    assert summary["eval_loss_before"] is summary["eval_loss_after"] is None


def test_constant_schedule_warms_up_and_checkpointing_changes_nothing(settings, tmp_path):
    plain = run_training(settings(train__schedule="constant", train__warmup=3, lora__lora_dropout=0.0))
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert rates == pytest.approx([0.0, 0.05 / 3, 0.1 / 3, 0.05, 0.05, 0.05])
    thrifty = run_training(
        settings(
            train__schedule="constant",
            train__warmup=3,
            lora__lora_dropout=0.0,
            train__gradient_checkpointing=True,
            out=str(tmp_path / "thrifty"),
        )
    )
    assert thrifty["eval_loss_after"] == pytest.approx(plain["eval_loss_after"], abs=1e-6)


def test_loraplus_is_logged_used_and_part_of_the_settings(settings, tmp_path, caplog):
    caplog.set_level("INFO", logger="lorakeet")
    plain = run_training(settings(out=str(tmp_path / "plain"), train__lr=1e-3))
    assert "LoRA+" not in caplog.text
    faster = run_training(settings(train__loraplus_ratio=16, train__lr=1e-3))
    assert "LoRA+      peak learning rate of B 0.016, of pairs on embeddings 1e-06" in caplog.text
    assert faster["eval_loss_after"] < plain["eval_loss_after"] - 1e-3
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(TrainingError, match=r"train.loraplus_ratio was 16.0, is None"):
        run_training(settings(train__lr=1e-3), resume=True)


def test_padding_and_logits_can_be_computed_with_the_same_losses(settings, tmp_path, monkeypatch):
    """A run skips padding and logits unless its settings demand them; its losses are the same either way."""
    used = []
    for name in ("padding_free", "fused_loss"):
        real = getattr(of_training, name)
        monkeypatch.setattr(of_training, name, lambda model, name=name, real=real: used.append(name) or real(model))
    losses = {}
    for padding_free in (True, False):
        for fused_loss in (True, False):
            used.clear()
            how = {"train__padding_free": padding_free, "train__fused_loss": fused_loss, "lora__lora_dropout": 0.0}
            summary = run_training(settings(out=str(tmp_path / f"{padding_free}{fused_loss}"), **how))
            losses[padding_free, fused_loss] = summary["eval_loss_after"]
            assert set(used) == {*["padding_free"] * padding_free, *["fused_loss"] * fused_loss}
    assert all(loss == pytest.approx(losses[False, False], abs=1e-5) for loss in losses.values())


def test_named_columns_decide_the_task(tmp_path):
    """An encoder with texts and labels of other names is a classifier, once ``data.columns`` names the columns."""
    base = save_tiny(tmp_path / "bert", "bert")
    data = write_rows(
        tmp_path / "a.jsonl", [{"body": row["text"], "queue": row["label"]} for row in rows_for("SEQ_CLS")]
    )
    tree = {"base": {"model": str(base)}, "data": {"path": str(data), "columns": {"text": "body", "label": "queue"}}}
    assert setup.task_settings(make_run(tree), inspect_model(make_run(tree).base)).type == "SEQ_CLS"


def test_data_is_not_opened_for_the_task_of_a_decoder(tmp_path):
    """A decoder has one task, whatever the columns: the file that is not there would raise an error."""
    tree = {
        "base": {"model": str(save_tiny(tmp_path / "llama", "llama"))},
        "data": {"path": str(tmp_path / "none.jsonl")},
    }
    config = make_run(tree)
    assert setup.task_settings(config, inspect_model(config.base)).type == "CAUSAL_LM"


# ---- refused, and nothing written -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data__path": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"data__path": None}, DataError, "no data given"),
        ({"data__columns": {"text": "body"}}, DataError, "body"),
        ({"base__model": "no/such-model"}, BaseModelError, "no/such-model"),
        ({"base__dtype": "fp16"}, BaseModelError, "fp16 cannot train on a CPU"),
        ({"lora__target_modules": ["q_prj"]}, TargetError, "q_prj"),
        ({"data__max_length": 999}, DataError, "999|64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_are_raised_before_anything_is_written(changes, error, message, settings, tmp_path):
    if "data__max_length" in changes:  # longer than the model takes
        long = tmp_path / "long.txt"
        long.write_text("\n".join([" ".join(WORDS * 5)] * 3 + ["a bird"]))
        changes = {**changes, "data__path": str(long), "data__eval_fraction": 0.0}
    with pytest.raises(error, match=message):
        run_training(settings(**changes))
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_by_chance(settings, tmp_path):
    first = run_training(settings(train__steps=1))
    for resume in (False, True):
        with pytest.raises(
            OutputError, match=r"already holds a finished run with .*: train\.steps was 1, is 6\n.*--overwrite"
        ):
            run_training(settings(), resume=resume, any_checkpoint=resume)
        before = files(tmp_path / "run")
        assert run_training(settings(train__steps=1), resume=resume) == first and files(tmp_path / "run") == before
    keep = tmp_path / "run" / "my-notes.txt"
    keep.write_text("mine")
    assert run_training(settings(train__steps=2), overwrite=True)["steps"] == 2
    assert keep.read_text() == "mine"
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "spectrum" not in line] == [
        0,
        1,
        2,
        2,
    ]


# ---- interrupted and resumed ----------------------------------------------------------------------------------------


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def with_callback(other):
    """Progress callback that does at the begin of a step what ``other`` does."""

    class Both(ProgressCallback):
        on_step_begin = other.on_step_begin

    return Both


def interrupted(monkeypatch, config, step, **how):
    with monkeypatch.context() as patch:
        patch.setattr(module, "ProgressCallback", with_callback(Interrupt(step)))
        with pytest.raises(InterruptedRunError) as caught:
            run_training(config, **how)
    return str(caught.value)


def test_ctrl_c_saves_and_the_resumed_run_is_the_uninterrupted_one(settings, tmp_path, monkeypatch, caplog):
    handler = signal.getsignal(signal.SIGINT)
    whole = run_training(settings(out=str(tmp_path / "whole"), train__eval_every=4))
    config = settings(out=str(tmp_path / "parts"), train__eval_every=4)
    message = interrupted(monkeypatch, config, 2)
    hint = f"resume with: lorakeet train {tmp_path}/parts/run.yaml --resume"
    assert message == f"stopped after step 3 of 6, a checkpoint is saved\nhint: {hint}"
    assert signal.getsignal(signal.SIGINT) is handler
    assert files(tmp_path / "parts") == {"run.yaml", "metrics.jsonl", "checkpoints"}
    with pytest.raises(OutputError, match=r"already holds a run with other settings: train\.steps was 6, is 7"):
        run_training(settings(out=str(tmp_path / "parts"), train__steps=7))
    caplog.set_level("INFO", logger="lorakeet")
    parts = run_training(config)
    first = caplog.records[0].getMessage()
    assert (
        first == f"continuing the run in {tmp_path}/parts after step 3, from {tmp_path}/parts/checkpoints/checkpoint-3"
    )
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    same = ("steps", "samples", "tokens", "train_loss_first", "train_loss_last", "eval_loss_before", "eval_loss_after")
    assert {key: parts[key] for key in same} == {key: whole[key] for key in same}
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    kept = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens")
    lines = [[line.get(key) for key in kept] for line in read_metrics(tmp_path / "parts" / "metrics.jsonl")]
    assert lines == [[line.get(key) for key in kept] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert run_training(config, resume=True) == parts and "is finished, so nothing is trained" in caplog.text


def test_layers_are_checkpointed_when_memory_is_short_without_changing_a_bit(settings, tmp_path, monkeypatch, caplog):
    """This holds too if memory gets short, or the setting changes, between one session and the next."""
    caplog.set_level("INFO", logger="lorakeet")
    weights = "adapter/adapter_model.safetensors"
    whole = run_training(settings(out=str(tmp_path / "whole")))
    assert "checkpointed: a pass" not in caplog.text
    parts = settings(out=str(tmp_path / "parts"))
    interrupted(monkeypatch, parts, 2)
    monkeypatch.setattr(module, "free_memory", lambda device: 350_000)
    assert run_training(parts, resume=True)["eval_loss_after"] == whole["eval_loss_after"]
    assert "checkpointed: a pass of 70 tokens" in caplog.text
    assert (tmp_path / "parts" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    told = run_training(settings(out=str(tmp_path / "told"), train__gradient_checkpointing=2))
    assert told["train_loss_last"] == whole["train_loss_last"]
    assert (tmp_path / "told" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_other_settings_do_not_resume_but_logging_and_saving_may_change(settings, monkeypatch):
    interrupted(monkeypatch, settings(), 2)
    with pytest.raises(TrainingError, match=r"train\.lr was 0\.05, is 0\.01; .*|train\.steps was 6, is 9"):
        run_training(settings(train__lr=0.01, train__steps=9), resume=True)
    assert run_training(settings(train__log_every=2, train__save_every=1), resume=True)["steps"] == 6


def test_other_data_in_the_same_file_does_not_resume(settings, monkeypatch):
    config = settings()
    interrupted(monkeypatch, config, 2)
    with Path(config.data.path).open("a") as file:
        file.write("a green song falls\n")
    with pytest.raises(TrainingError, match="data was "):
        run_training(config, resume=True)
    assert run_training(config, resume=True, any_checkpoint=True)["steps"] == 6


def test_a_second_ctrl_c_acts_at_once_but_an_echo_does_not(monkeypatch):
    with StopAfterStep() as stop:
        with pytest.raises(KeyboardInterrupt):  # nothing has begun
            signal.raise_signal(signal.SIGINT)
        stop.on_train_begin(None, None, None)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.requested
        monkeypatch.setattr(stop_module, "ECHO", 0.0)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_the_base_is_measured_acts_at_once(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Trainer, "evaluate", lambda _: signal.raise_signal(signal.SIGINT))
        run_training(settings())
    assert files(tmp_path / "run") == {"run.yaml", "checkpoints"}
    assert run_training(settings(), resume=True)["steps"] == 6


def test_killed_before_the_first_checkpoint_starts_again(settings, monkeypatch):
    def torn(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module.Trainer, "train", torn)
        run_training(settings())
    assert run_training(settings(), resume=True)["steps"] == 6


def test_a_signal_in_the_last_step_ends_the_run_as_planned(settings, monkeypatch):
    monkeypatch.setattr(module, "ProgressCallback", with_callback(Interrupt(5)))
    assert run_training(settings())["steps"] == 6


@pytest.mark.slow
def test_the_signal_of_a_real_terminal(settings, tmp_path):
    config = settings(train__steps=2000)
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    code = (
        "import sys; from lorakeet.config import read_run; from lorakeet.train.run import *\n"
        "try: run_training(read_run(sys.argv[1]))\n"
        "except InterruptedRunError as error: print(error); sys.exit(2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
    metrics = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "--resume" in told and "a checkpoint is saved" in told
    assert list((Path(config.out) / "checkpoints").glob("checkpoint-*"))
