"""What a run tells while it goes on and what it leaves behind: progress, ``metrics.jsonl``, ``loss_curve.png``.

``metrics.jsonl`` holds one JSON object a line. A training line has ``step``, ``epoch``, ``loss`` (mean per target token
since the line before), ``learning_rate``, ``grad_norm`` (before clipping), ``tokens`` (real tokens so far, padding not
counted), ``tokens_per_second`` (since the line before) and ``seconds`` (of training so far; evaluating and saving are
not counted). A held-out line has ``step``, ``epoch``, ``eval_loss`` and the figures of its task, such as
``eval_perplexity`` and ``eval_tokens`` or ``eval_accuracy``; step 0 is the base before it has learned.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from lorakeet.files import write_file
from lorakeet.log import info
from lorakeet.runs.metrics_log import append_metrics, read_metrics

#: Figures of an evaluation that say how long it took: the parent of the Trainer adds them.
TIMES = ("_runtime", "_per_second")
#: Seconds between two lines where stderr is no terminal.
QUIET_SECONDS = 10.0


class ProgressCallback(TrainerCallback):
    """Writes ``metrics.jsonl`` and shows how far the run is, in the main process only.

    Needs ``include_num_input_tokens_seen="non_padding"`` in the TrainingArguments, which counts the real tokens.

    Args:
        path: Of ``metrics.jsonl``. A resumed run drops the lines after its checkpoint and goes on below.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.seconds = 0.0  # of training, up to the last step
        self._mark = 0.0  # when the clock was last read
        self._line = {"tokens": 0, "seconds": 0.0}  # of the last line of training
        self._measured = 0  # batches of the evaluation at hand
        self._shown = Shown()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        with write_file(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        trained = [line for line in kept if "loss" in line]
        self.seconds = trained[-1]["seconds"] if trained else 0.0
        self._line = {"tokens": state.num_input_tokens_seen, "seconds": self.seconds}
        self._shown.open(state.max_steps, state.global_step)
        self._mark = time.perf_counter()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark = time.perf_counter()  # what was rehearsed before is no training

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        if state.is_world_process_zero:
            self._shown.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        tokens, seconds = state.num_input_tokens_seen, self.seconds
        rate = (tokens - self._line["tokens"]) / max(seconds - self._line["seconds"], 1e-9)
        self._line = {"tokens": tokens, "seconds": seconds}
        line = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 6),
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": tokens,
            "tokens_per_second": round(rate, 2),
            "seconds": round(seconds, 3),
        }
        append_metrics(self.path, line)
        self._shown.figures(logs["loss"], rate)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        self._measured += 1
        if state.is_world_process_zero and hasattr(eval_dataloader, "__len__"):
            self._shown.measuring(self._measured, len(eval_dataloader))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and metrics:
            figures = {
                name: value
                for name, value in metrics.items()
                if name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith(TIMES)
            }
            append_metrics(self.path, {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **figures})
            if "eval_loss" in figures:
                info(f"step {state.global_step}: held-out loss {figures['eval_loss']:.4f}")
        self._mark, self._measured = time.perf_counter(), 0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark = time.perf_counter()

    def close(self) -> None:
        """Take the progress bar away (also after an error)."""
        self._shown.close()


class Shown:
    """How far the run is, on stderr: a bar on a terminal, else a line every :data:`QUIET_SECONDS`."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.first = self.last = self.steps = 0
        self.loss = self.rate = float("nan")
        self.began = self.spoke = 0.0

    def open(self, steps: int, done: int) -> None:
        self.steps, self.first, self.last = steps, done, done
        self.began = self.spoke = time.monotonic()
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s "),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            self.bar.add_task("training", total=steps, completed=done, loss=self.loss, rate=self.rate)
            self.bar.start()

    def figures(self, loss: float, rate: float) -> None:
        self.loss, self.rate = loss, rate
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], loss=loss, rate=rate)
        elif time.monotonic() - self.spoke >= QUIET_SECONDS or self.last == self.steps:
            self.spoke = time.monotonic()
            left = (self.spoke - self.began) / max(self.last - self.first, 1) * (self.steps - self.last)
            info(f"step {self.last} of {self.steps}: loss {loss:.4f}, {rate:,.0f} tokens/s, {clock(left)} left")

    def measuring(self, done: int, batches: int) -> None:
        now = time.monotonic()
        self.spoke = self.spoke or now
        if now - self.spoke >= QUIET_SECONDS:
            self.spoke = now
            info(f"measuring the held-out loss: {done} of {batches} batches")

    def step(self, step: int) -> None:
        self.last = step
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def smoothed(losses: list[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start (as Adam corrects its moments)."""
    values, mean, norm = [], 0.0, 0.0
    for loss in losses:
        mean = weight * mean + (1 - weight) * loss
        norm = weight * norm + (1 - weight)
        values.append(mean / norm)
    return values


def draw_loss_curve(lines: Iterable[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Training loss (each line pale, its moving average strong) and held-out points, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the start: a training is shorter of memory
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    lines = list(lines)
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if trained:
        steps, losses = map(list, zip(*trained, strict=True))
        axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, as logged")
        axes.plot(steps, smoothed(losses, 0.9), color="#08519c", linewidth=2, label="training, moving average")
    if held_out:
        steps, losses = map(list, zip(*held_out, strict=True))
        axes.plot(steps, losses, "o--", color="#d94801", markersize=7, linewidth=1, label="held out")
        for at in {0, len(steps) - 1}:
            axes.annotate(
                f"{losses[at]:.3f}",
                (steps[at], losses[at]),
                xytext=(0, 9),
                textcoords="offset points",
                ha="left" if at == 0 else "right",
                color="#d94801",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token (nats)")
    axes.set_title(title)
    axes.margins(x=0.02, y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if trained or held_out:
        axes.legend(frameon=False)
    with write_file(path) as aside:
        figure.savefig(aside, format="png")
