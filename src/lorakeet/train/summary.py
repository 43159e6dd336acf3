"""Contents of ``summary.json``, and the comparison of figures that a run logs at its end."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lorakeet._version import __version__
from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.load import Base
from lorakeet.data.prepared import Prepared
from lorakeet.runs.metrics_log import first_and_last, peak_rss_bytes, read_metrics
from lorakeet.tasks.baselines import baseline
from lorakeet.tasks.task import Task

#: Figures that are no score.
_COUNTS = ("loss", "perplexity", "tokens", "targets")
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
        wall_seconds: Time since the run was started.
    """

    steps: int
    samples: int
    tokens: int
    train_seconds: float
    wall_seconds: float


def summarize(
    folder: Path, base: Base, model: PeftModel, task: Task, data: Prepared, done: Progress, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the contents of ``summary.json``.

    Args:
        folder: The run's folder, with its ``metrics.jsonl``.
        base: The base model.
        model: The base with the adapter.
        task: The run's task.
        data: The prepared data; its report is part of the summary.
        done: Work of the run.
        settings: Values for ``bits``, ``device``, ``processes`` and ``seed``.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    measured = [held_out_figures(line) for line in lines if "eval_loss" in line]
    before, after = (measured[0], measured[-1]) if measured else (None, None)
    first, last = first_and_last(lines)
    trainable, total = model.get_nb_trainable_parameters()
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
        "baseline": baseline(task, data),
        "tokens_per_second": done.tokens / done.train_seconds if done.train_seconds else None,
        "train_seconds": done.train_seconds,
        "wall_seconds": done.wall_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if base.device.type == "cuda" else None,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "adapter_path": str(folder / "adapter"),
        "dtype": str(base.dtype).removeprefix("torch."),
        **{name: settings[name] for name in ("bits", "device", "processes", "seed")},
        "lora": model.peft_config["default"].model_dump(mode="json", include=_LORA_SETTINGS),
        "data": asdict(data.report),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, Lorakeet, torch and transformers."""
    return {
        "python": platform.python_version(),
        "lorakeet": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
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
