"""Contents of ``summary.json``, and the comparison of figures that a run logs at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.load import Base
from lorakeet.data.prepared import Prepared
from lorakeet.errors import TrainingError
from lorakeet.log import warn
from lorakeet.runs.metrics_log import first_and_last
from lorakeet.runs.process_memory import peak_rss_bytes
from lorakeet.tasks.baselines import baseline
from lorakeet.tasks.task import Task
from lorakeet.train.callbacks.spectrum import verdict
from lorakeet.train.checkpoints.fingerprint import versions
from lorakeet.train.processes.agreement import of_all_processes

#: Figures that are no score.
_COUNTS = ("loss", "perplexity", "tokens", "targets")
#: Scores that are better when they are lower.
_ERRORS = ("mse", "mae", "rmse")
#: Change of a loss, as a share of it, that is more than noise between two short runs.
NOTICEABLE = 0.01
#: Rise of a loss, as a share of it, that no run that learns has.
CLEAR = 0.2
#: Outcome of a run -> message and hint for the user; a run that learned needs none.
OUTCOMES = {
    "diverged": ("the run diverged", "lower the learning rate: --lr"),
    "worse": ("the run made the model worse", "lower the learning rate: --lr"),
    "overfitted": ("the held-out loss rose while the training loss fell", "take fewer epochs, or more data"),
    "learned nothing": ("the adapter learned next to nothing", "take more steps (--epochs), or a higher --lr"),
    "no better than the baseline": (
        "the adapter predicts no better than the baseline, which reads no text",
        "take more steps (--epochs), a higher --lr, or more data",
    ),
}
#: Settings of the adapter that the summary repeats.
_LORA_SETTINGS = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias"}


@dataclass(frozen=True)
class Progress:
    """Work that a run has done.

    Attributes:
        steps: Optimizer steps.
        samples: Samples trained on, each pass over the data counted again.
        tokens: Real tokens trained on.
        train_seconds: Time in the training loop.
        wall_seconds: Time since the run was started; of the sessions before a resumed run, their time of training.
    """

    steps: int
    samples: int
    tokens: int
    train_seconds: float
    wall_seconds: float


def summarize(
    folder: Path,
    base: Base,
    model: PeftModel,
    task: Task,
    data: Prepared,
    done: Progress,
    settings: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the contents of ``summary.json``.

    Args:
        folder: The run's folder.
        base: The base model.
        model: The base with the adapter.
        task: The run's task.
        data: The prepared data; its report is part of the summary.
        done: Work of the run.
        settings: Values for ``bits``, ``device``, ``processes`` and ``seed``.
        lines: The lines of the metrics log.
    """
    measured = [held_out_figures(line) for line in lines if "eval_loss" in line]
    before, after = (measured[0], measured[-1]) if measured else (None, None)
    first, last = first_and_last(lines)
    spectrum = next((line["spectrum"] for line in reversed(lines) if "spectrum" in line), None)
    trainable, total = model.get_nb_trainable_parameters()
    plain = baseline(task, data)
    rss, on_device = of_all_processes(peak_rss_bytes()), of_all_processes(torch.cuda.max_memory_allocated())
    return {
        "base_model": base.name,
        "task": task.notes(),
        "steps": done.steps,
        "samples": done.samples,
        "tokens": done.tokens,
        "train_loss_first": first,
        "train_loss_last": last,
        "eval_loss_before": before["loss"] if before else None,
        "eval_loss_after": after["loss"] if after else None,
        "eval_tokens": data.report.held_out_targets if after is None else after.get("tokens", after.get("targets")),
        "before": before,
        "after": after,
        "baseline": plain,
        "outcome": outcome(before, after, plain, (first, last)),
        "spectrum": spectrum,
        "rank": verdict(spectrum)[0] if spectrum else None,
        "tokens_per_second": done.tokens / done.train_seconds if done.train_seconds else None,
        "train_seconds": done.train_seconds,
        "wall_seconds": done.wall_seconds,
        "peak_rss_bytes": max(rss),
        "peak_device_bytes": max(on_device) if base.device.type == "cuda" else None,
        "peak_bytes_by_process": on_device if base.device.type == "cuda" else rss,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "adapter_path": str(folder / "adapter"),
        "dtype": str(base.dtype).removeprefix("torch."),
        **{name: settings[name] for name in ("bits", "device", "processes", "seed")},
        "lora": model.peft_config["default"].model_dump(mode="json", include=_LORA_SETTINGS),
        "data": asdict(data.report),
        "versions": versions(),
    }


def samples_seen(steps: int, rows: int, per_step: int) -> int:
    """Return the samples trained on; the last step of a pass over the data may be smaller.

    Args:
        steps: Optimizer steps.
        rows: Samples of the data; 0 of a stream, whose length is unknown.
        per_step: Samples of a full step.
    """
    if not rows:
        return steps * per_step
    passes, rest = divmod(steps, -(-rows // per_step))
    return passes * rows + min(rest * per_step, rows)


def held_out_figures(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a held-out line of ``metrics.jsonl``, without their prefix."""
    return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}


def outcome(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, plain: Mapping[str, Any], train: Sequence[float]
) -> str:
    """Return how a run ended: one of :data:`OUTCOMES`.

    Args:
        before: Held-out figures of the base; None without held-out rows.
        after: Held-out figures at the end.
        plain: Figures of the baseline that needs no model.
        train: First and last training loss, in nats, see :func:`lorakeet.runs.metrics_log.first_and_last`.
    """
    first, last = train
    if before is None or after is None:
        return "diverged" if last > first * (1 + CLEAR) else "learned"
    change = after["loss"] / before["loss"] - 1 if before["loss"] else 0.0
    rose = last >= min(first, before["loss"])  # the first steps of a run that explodes have a high loss already
    if not math.isfinite(after["loss"]) or (change > CLEAR and rose):
        return "diverged"
    if change > NOTICEABLE:
        return "worse" if rose else "overfitted"
    if change > -NOTICEABLE:
        return "learned nothing"
    scores = [name for name in plain if name in after and name not in _COUNTS]
    if scores and not any(_better(name, after[name], plain[name]) for name in scores):
        return "no better than the baseline"
    return "learned"


def _better(name: str, value: float, other: float) -> bool:
    return value < other if name in _ERRORS else value > other


def report_outcome(summary: Mapping[str, Any]) -> None:
    """Warn of a run that did not learn.

    Raises:
        TrainingError: The run diverged. Its adapter and figures are written.
    """
    how = summary["outcome"]
    if how == "learned":
        return
    message, hint = OUTCOMES[how]
    losses = "training loss {train_loss_first:.4f} at first, {train_loss_last:.4f} at last"
    if summary["before"] is not None:
        losses = "held-out loss {before[loss]:.4f} before, {after[loss]:.4f} after"
    text = f"{message} ({losses.format_map(summary)}, {summary['steps']} steps)"
    if how == "diverged":
        raise TrainingError(f"{text}; {summary['adapter_path']} holds its adapter", hint)
    warn(f"{text}: {hint}")


def compare_figures(summary: Mapping[str, Any]) -> list[str]:
    """Return a line for each figure of the task: before, after, and the baseline that needs no model."""
    before, after, plain = summary["before"], summary["after"], summary["baseline"] or {}
    if after is None:
        return []
    lines = [f"held-out loss {before['loss']:.4f} before, {after['loss']:.4f} after"]
    for name in after:
        if name in before and name not in _COUNTS:
            without = f", baseline {plain[name]:.4f}" if name in plain else ""
            lines.append(f"{name:<13} {before[name]:.4f} before, {after[name]:.4f} after{without}")
    return lines
