"""What a finished run says of itself: ``summary.json``, and a few lines for the person who waited."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import transformers

from lorakeet._version import __version__
from lorakeet.runs.metrics_log import first_and_last, peak_rss_bytes, read_metrics
from lorakeet.tasks.baselines import baseline
from lorakeet.train.progress_callback import ProgressCallback
from lorakeet.train.trainer import Trainer

if TYPE_CHECKING:
    from lorakeet.train.run import Run

#: Figures that are no score.
_COUNTS = ("loss", "perplexity", "tokens", "targets")


def summarize(run: Run, trainer: Trainer, report: ProgressCallback) -> dict[str, Any]:
    """Everything that ``summary.json`` holds."""
    lines = read_metrics(run.folder / "metrics.jsonl")
    measured = [held_out_figures(line) for line in lines if "eval_loss" in line]
    before, after = (measured[0], measured[-1]) if measured else (None, None)
    first, last = first_and_last(lines)
    trainable, every = run.model.get_nb_trainable_parameters()
    tokens, steps = trainer.state.num_input_tokens_seen, trainer.state.global_step
    return {
        "base_model": run.base.name,
        "task": run.task.notes(),
        "steps": steps,
        "samples": samples_seen(run, steps),
        "tokens": tokens,
        "train_loss_first": first,
        "train_loss_last": last,
        "eval_loss_before": before["loss"] if before else None,
        "eval_loss_after": after["loss"] if after else None,
        "eval_tokens": run.data.report.held_out_targets,
        "before": before,
        "after": after,
        "baseline": baseline(run.task, run.data),
        "tokens_per_second": tokens / report.seconds if report.seconds else None,
        "train_seconds": report.seconds,
        "wall_seconds": time.perf_counter() - run.began,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if run.args.device.type == "cuda" else None,
        "trainable_parameters": trainable,
        "all_parameters": every,
        "adapter_path": str(run.folder / "adapter"),
        "dtype": str(run.base.dtype).removeprefix("torch."),
        "bits": run.config.base.bits,
        "device": str(run.args.device),
        "processes": run.args.world_size,
        "seed": run.config.train.seed,
        "lora": run.model.peft_config["default"].model_dump(
            mode="json", include={"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias"}
        ),
        "data": asdict(run.data.report),
        "versions": {
            "python": platform.python_version(),
            "lorakeet": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def samples_seen(run: Run, steps: int) -> int:
    """Samples learned from, each pass over the data counted again; the last step of a pass may be smaller."""
    rows = run.data.report.train_samples
    per_step = run.config.train.batch_size * run.config.train.grad_accum * run.args.world_size
    if not rows:  # a stream, whose length nobody knows
        return steps * per_step
    passes, rest = divmod(steps, -(-rows // per_step))
    return passes * rows + min(rest * per_step, rows)


def held_out_figures(line: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one measurement in ``metrics.jsonl``, without the prefix that says where they were taken."""
    return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}


def compared(summary: Mapping[str, Any]) -> list[str]:
    """A line for each figure of the task: before, after, and what a program without a model would reach."""
    before, after, plain = summary["before"], summary["after"], summary["baseline"] or {}
    if after is None:
        return []
    lines = [f"held-out loss {before['loss']:.4f} before, {after['loss']:.4f} after"]
    for name in after:
        if name in before and name not in _COUNTS:
            beside = f", baseline {plain[name]:.4f}" if name in plain else ""
            lines.append(f"{name:<13} {before[name]:.4f} before, {after[name]:.4f} after{beside}")
    return lines
