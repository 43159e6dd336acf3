"""The outcome of a run: a run that went wrong is no success, and what was learned is kept."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.errors import OutputError, TrainingError
from lorakeet.train import run as module
from lorakeet.train.callbacks.progress import ProgressCallback
from lorakeet.train.checkpoints import resumable
from lorakeet.train.run import run_training
from lorakeet.train.summary import OUTCOMES, outcome, report_outcome


@pytest.mark.parametrize(
    ("before", "after", "train", "expected"),
    [
        (5.0, 3.0, (5.0, 3.0), "learned"),
        (5.0, 4.96, (5.0, 4.0), "learned nothing"),
        (5.0, 5.04, (5.0, 5.1), "learned nothing"),
        (5.0, 5.2, (5.0, 4.0), "overfitted"),
        (5.0, 9.0, (5.0, 4.0), "overfitted"),
        (5.0, 5.2, (5.0, 5.2), "worse"),
        (5.0, 9.0, (5.0, 9.0), "diverged"),
        (5.0, 9.0, (20.0, 9.0), "diverged"),
        (5.0, float("nan"), (5.0, 4.0), "diverged"),
        (None, None, (5.0, 4.0), "learned"),
        (None, None, (5.0, 7.0), "diverged"),
        (0.0, 0.0, (0.0, 0.0), "learned nothing"),
    ],
)
def test_the_outcome_of_losses(before: float | None, after: float | None, train: tuple, expected: str) -> None:
    figures = [None if loss is None else {"loss": loss} for loss in (before, after)]
    assert outcome(*figures, {}, train) == expected


@pytest.mark.parametrize(
    ("after", "plain", "expected"),
    [
        ({"accuracy": 0.9}, {"accuracy": 0.5}, "learned"),
        ({"accuracy": 0.5, "macro_f1": 0.5}, {"accuracy": 0.5, "macro_f1": 0.3}, "learned"),
        ({"accuracy": 0.5, "macro_f1": 0.3}, {"accuracy": 0.5, "macro_f1": 0.3}, "no better than the baseline"),
        ({"mse": 0.5}, {"mse": 0.6}, "learned"),
        ({"mse": 0.7}, {"mse": 0.6}, "no better than the baseline"),
        ({"exact_match": 0.7}, {}, "learned"),
    ],
)
def test_the_outcome_beside_a_baseline(after: dict, plain: dict, expected: str) -> None:
    assert outcome({"loss": 2.0}, {"loss": 1.0, **after}, plain, (2.0, 1.0)) == expected


@pytest.mark.parametrize("how", [name for name in OUTCOMES if name != "diverged"])
def test_a_run_that_did_not_learn_warns(how: str, caplog: pytest.LogCaptureFixture) -> None:
    figures = {"outcome": how, "before": {"loss": 2.0}, "after": {"loss": 2.0}, "steps": 3}
    report_outcome(figures)
    assert OUTCOMES[how][0] in caplog.text and "2.0000 before" in caplog.text


def test_a_run_that_diverged_is_an_error_and_its_figures_are_kept(settings, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the run diverged \(held-out loss .* 4 steps\).*adapter") as caught:
        run_training(
            settings(lora__target_modules=["lm_head"], train__lr=1.0, train__schedule="constant", train__steps=4)
        )
    assert "--lr" in caught.value.hint
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["outcome"] == "diverged" and summary["after"]["loss"] > summary["before"]["loss"]


def test_an_adapter_that_cannot_be_written_is_kept_elsewhere(
    settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKEET_HOME", str(tmp_path / "home"))

    class Obstacle(ProgressCallback):
        def on_train_end(self, args, state, control, **_) -> None:
            (tmp_path / "run" / "adapter").write_text("a file in the way")

    monkeypatch.setattr(module, "ProgressCallback", Obstacle)
    with pytest.raises(OutputError, match="what was learned is saved in") as caught:
        run_training(settings())
    (place,) = (tmp_path / "home" / "rescued").iterdir()
    assert str(place) in caught.value.message and "mv" in caught.value.hint
    assert inspect_adapter(place)


def test_a_run_without_room_ends_before_its_first_step(settings, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100_000})())
    with pytest.raises(OutputError, match=r"0\.1 MB free"):
        run_training(settings())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_left_out_and_the_run_goes_on(settings, monkeypatch, caplog) -> None:
    real = resumable.write_manifest

    def full(folder: Path, *rest) -> None:
        if "checkpoint-2." in folder.name:
            raise OSError(errno.ENOSPC, "full")
        real(folder, *rest)

    monkeypatch.setattr(resumable, "write_manifest", full)
    summary = run_training(settings(train__save_every=2))
    assert summary["steps"] == 6
    assert "step 2 has no checkpoint" in caplog.text
    folder = Path(summary["adapter_path"]).parent / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-6"]
