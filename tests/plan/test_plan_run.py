"""Plan of a run: passes as the run has them, memory and time beside the measurement, and what makes it fit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.tiny_tasks import rows_for, save_tiny, write_rows
from lorakeet.api import fit_training, plan_training
from lorakeet.cli import main
from lorakeet.config import make_run, read_run
from lorakeet.errors import ConfigError
from lorakeet.plan.fit import SHORTEST, bytes_of
from lorakeet.plan.passes import largest_pass, training_passes, typical_passes
from lorakeet.plan.plan import step_seconds
from lorakeet.runs import process_memory
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.train.run import run_training


def test_a_run_starts_with_its_plan_and_compares_it(
    settings: Any, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="lorakeet")
    process_memory.restart_peak()
    monkeypatch.setattr(process_memory, "_earlier_peak", 0)  # of other tests in this process
    before = torch.get_rng_state()
    plan = plan_training(settings())
    assert torch.equal(torch.get_rng_state(), before)
    summary = run_training(settings())
    said = [record.message for record in caplog.records]
    assert next(i for i, m in enumerate(said) if m.startswith("memory ")) < next(
        i for i, m in enumerate(said) if m.startswith("base ")
    )
    assert summary["planned_peak_bytes"] / summary["peak_rss_bytes"] == summary["planned_peak_ratio"]
    assert 0.7 < summary["planned_peak_ratio"] < 1.4  # most of it is Python and torch
    assert summary["planned_step_seconds"] > 0 and summary["planned_step_ratio"] > 0
    assert summary["trainable_parameters"] == plan.trainable_parameters
    assert summary["all_parameters"] == plan.all_parameters and summary["steps"] == plan.steps
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert plan.step_tokens * plan.steps == lines[-1]["tokens"]  # the very rows of every step


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("bert", "SEQ_CLS"),
        ("bert", "MASKED_LM"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("bert", "FEATURE_EXTRACTION"),
        ("bert", "QUESTION_ANS"),
    ],
)
def test_every_task_is_planned_as_it_trains(kind: str, task: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows_for(task, 40))
    config = make_run(
        {
            "base": {"model": str(save_tiny(tmp_path / kind, kind)), "device": "cpu", "dtype": "fp32"},
            "data": {"path": str(data)},
            "task": {"type": task},
            "train": {"steps": 2, "batch_size": 4, "grad_accum": 1},
            "out": str(tmp_path / "run"),
        }
    )
    plan = plan_training(config)
    assert plan.memory.activations > 0 and plan.memory.evaluation > 0 and plan.step_seconds > 0
    summary = run_training(config)
    assert summary["trainable_parameters"] == plan.trainable_parameters
    assert summary["all_parameters"] == plan.all_parameters
    assert summary["planned_peak_bytes"] is not None


def test_the_second_plan_is_read_from_the_cache(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan_training(settings())
    monkeypatch.setattr("lorakeet.train.planning.pass_meter.measure_pass", None)
    again = plan_training(settings())
    assert again.step_seconds == first.step_seconds and again.memory.activations == first.memory.activations
    with pytest.raises(TypeError):
        plan_training(settings(lora__r=8))


def test_passes_share_micro_batches_and_the_largest_has_the_longest_rows() -> None:
    train = make_run({"train": {"batch_size": 2, "grad_accum": 2, "steps": 3, "seed": 1}}).train
    lengths = [1, 2, 3, 4, 5, 6, 7, 8]
    together = training_passes(lengths, train, lambda sizes: [len(sizes)], True)
    assert [len(step) for step in together] == [1, 1, 1] and sum(step[0].tokens for step in together[:2]) == 36
    alone = training_passes(lengths, train, lambda sizes: [1] * len(sizes), False)
    assert [len(step) for step in alone] == [2, 2, 2]
    assert all(each.tokens == 2 * max(lengths[row] for row in each.batches[0]) for step in alone for each in step)
    largest = largest_pass(lengths, train, lambda sizes: [len(sizes)], True)
    assert largest == max((step[0] for step in together), key=lambda each: each.tokens)
    assert typical_passes(together, largest)[0] == largest
    longest = largest_pass(lengths, train, lambda sizes: [len(sizes)], True, order_known=False)
    assert longest.batches == ((7, 6), (5, 4)) and longest.tokens == 26 > largest.tokens
    of_all = largest_pass(lengths, train, lambda sizes: [1] * len(sizes), False, processes=2)
    assert of_all.tokens == 16  # each step has all rows, in one of its processes the longest two


# ---- what makes it fit ----------------------------------------------------------------------------------------------


def test_what_fits_is_not_changed_and_what_cannot_fit_is_an_error(settings: Any) -> None:
    config = settings()
    assert not fit_training(config, "100GB").changes
    few = settings(base__bits=8, train__batch_size=1, data__max_length=2 * SHORTEST - 1)  # few changes to try
    with pytest.raises(ConfigError, match="no settings fit into 1.0 MB: the least that was found is"):
        fit_training(few, "1MB")


#: Run in a process of its own: the few bytes of a tiny model drown in what other tests leave behind.
LESS_MEMORY = """
import sys
from lorakeet.config import read_run
from lorakeet.plan.fit import fit, with_changes
from lorakeet.train.planning.planner import Planner
config, planner, seen = read_run(sys.argv[1]), Planner(), []
planner.plan(config)  # the costs of passes are saved, so that planning itself takes nothing below
whole = planner.plan(config).memory
for share in (1.0, 0.7, 0.5):
    limit = whole.fixed + int(share * (whole.peak - whole.fixed)) + 1
    found = fit(config, planner.plan, int(limit / 0.95) + 2)
    assert found.plan.memory.peak <= limit and found.plan.memory.peak <= whole.peak
    assert with_changes(config, found.changes) == found.config
    step = config.train.batch_size * config.train.grad_accum
    assert found.config.train.batch_size * found.config.train.grad_accum == step
    seen.append(len(found.changes))
assert seen[0] <= seen[1] <= seen[2] and seen[2] > 0, seen
"""


@pytest.mark.slow
def test_less_memory_takes_more_changes(settings: Any, tmp_path: Path) -> None:
    """A large vocabulary is not needed: activations of long passes are what the changes lower."""
    (tmp_path / "run.yaml").write_text(settings(train__batch_size=8, train__grad_accum=4).to_yaml(), encoding="utf-8")
    subprocess.run([sys.executable, "-c", LESS_MEMORY, str(tmp_path / "run.yaml")], check=True)


@pytest.mark.parametrize(("text", "count"), [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("300mb", 3 * 10**8)])
def test_sizes_of_memory(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "GB", "2 XB", "-1GB", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size of memory"):
        bytes_of(text)


def test_a_step_takes_what_its_lines_say() -> None:
    lines = [{"step": 1, "seconds": 5.0}, {"step": 1, "eval_loss": 2.0}, {"step": 4, "seconds": 11.0}]
    assert step_seconds(lines) == 2.0 and step_seconds(lines[:1]) == 5.0 and step_seconds([]) is None


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_takes_all_settings_and_writes_what_fits(settings: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(settings().to_yaml(), encoding="utf-8")
    written = tmp_path / "plan.yaml"
    assert main(["plan", str(file), "lora.r=2", "--fit", "50GB", "--write", str(written)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("4 layers (2 q_proj, 2 v_proj), rank 2\ntrainable params:")
    for said in ("activations", "peak, training", "time ", "disk ", "changes      none"):
        assert said in out
    assert read_run(written) == settings(lora__r=2)
    assert main(["plan", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["peak_bytes"] == max(found["plan"]["peaks"].values())
    assert yaml.safe_load(written.read_text())["lora"]["r"] == 2


@pytest.mark.slow
def test_a_fitted_run_peaks_below_the_limit(real_home: Path, tmp_path: Path) -> None:
    """The real base in its own process, with passes that would take 2.6 GB."""
    import subprocess
    import sys

    draw = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "far", "away"]
    rows = [{"text": " ".join(draw.choices(words, k=480))} for _ in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--data", "rows.jsonl", "--batch-size", "8", "--bits", "32", "--steps", "2", "--out", "run"]
    here = {"cwd": tmp_path, "check": True}
    subprocess.run([sys.executable, "-m", "lorakeet", "plan", *flags, "--fit", "1.6GB", "--write", "fit.yaml"], **here)
    subprocess.run([sys.executable, "-m", "lorakeet", "train", "fit.yaml"], **here)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["peak_rss_bytes"] < 1.6e9
    assert summary["planned_peak_ratio"] == pytest.approx(1, abs=0.1)
