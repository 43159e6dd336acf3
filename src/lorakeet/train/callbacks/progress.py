"""Callback of the Trainer that writes ``metrics.jsonl`` and shows progress.

``metrics.jsonl`` holds one JSON object per line. A training line has:

- ``step``, ``epoch``, ``loss`` (mean per target token since the previous line), ``learning_rate``,
- ``grad_norm`` (before clipping), ``tokens`` (real tokens so far, without padding),
- ``tokens_per_second`` (since the previous line), ``seconds`` (of training so far, without evaluating and saving).

A held-out line has ``step``, ``epoch``, ``eval_loss`` and the figures of its task, such as ``eval_perplexity`` and
``eval_tokens`` or ``eval_accuracy``. Step 0 is the base before training.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lorakeet.log import info
from lorakeet.runs.metrics_log import MetricsLog

#: Endings of figures that tell how long an evaluation took; the parent of the Trainer adds them.
TIMES = ("_runtime", "_per_second")
#: Seconds between two progress lines where stderr is no terminal.
LINE_INTERVAL = 10.0


class ProgressCallback(TrainerCallback, ExportableState):
    """Writer of ``metrics.jsonl`` and progress display, in the main process only; a checkpoint holds its lines.

    Needs ``include_num_input_tokens_seen="non_padding"`` in the TrainingArguments, which counts the real tokens.

    Args:
        path: Path of ``metrics.jsonl``. A resumed run drops the lines after its checkpoint and appends.
    """

    def __init__(self, path: str | Path) -> None:
        self.log = MetricsLog(path)
        self.seconds = 0.0  # of training, up to the last step
        self.earlier_seconds = 0.0  # those of the sessions before a resumed run
        self._mark = 0.0  # last reading of the clock
        self._line = {"tokens": 0, "seconds": 0.0}  # of the last training line
        self._measured = 0  # batches of the current evaluation
        self._display = ProgressDisplay()
        self.saved_lines: list[str] | None = None  # of the checkpoint that a run resumes from, each as JSON

    def state(self) -> dict[str, Any]:
        """Return the lines of the log for a checkpoint, as text: the checkpoint's JSON would sort their fields."""
        lines = [json.dumps(line) for line in self.log.read()]
        return {"args": {"path": str(self.log.path)}, "attributes": {"saved_lines": lines}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = self.log.read() if self.saved_lines is None else [json.loads(line) for line in self.saved_lines]
        self.saved_lines = None
        self.log.replace([line for line in lines if line["step"] <= state.global_step])
        trained = [line for line in self.log.read() if "loss" in line]
        self.seconds = self.earlier_seconds = trained[-1]["seconds"] if trained else 0.0
        self._line = {"tokens": state.num_input_tokens_seen, "seconds": self.seconds}
        self._display.open(state.max_steps, state.global_step)
        self._mark = time.perf_counter()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark = time.perf_counter()  # rehearsals do not count as training

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        if state.is_world_process_zero:
            self._display.step(state.global_step)

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
        self.log.append(line)
        self._display.figures(logs["loss"], rate)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        self._measured += 1
        if state.is_world_process_zero and hasattr(eval_dataloader, "__len__"):
            self._display.measuring(self._measured, len(eval_dataloader))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and metrics:
            figures = {
                name: value
                for name, value in metrics.items()
                if name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith(TIMES)
            }
            self.log.append({"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **figures})
            if "eval_loss" in figures:
                info(f"step {state.global_step}: held-out loss {figures['eval_loss']:.4f}")
        self._mark, self._measured = time.perf_counter(), 0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark = time.perf_counter()

    def close(self) -> None:
        """Remove the progress bar (also after an error)."""
        self._display.close()


class ProgressDisplay:
    """Progress on stderr: a bar on a terminal, else a line every :data:`LINE_INTERVAL` seconds."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.first = self.last = self.steps = 0
        self.loss = self.rate = float("nan")
        self.began = self.last_line = 0.0

    def open(self, steps: int, done: int) -> None:
        """Begin to show a training of ``steps`` steps, of which some are done."""
        self.steps, self.first, self.last = steps, done, done
        self.began = self.last_line = time.monotonic()
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
        """Show loss and speed (tokens per second) of a training line."""
        self.loss, self.rate = loss, rate
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], loss=loss, rate=rate)
        elif time.monotonic() - self.last_line >= LINE_INTERVAL or self.last == self.steps:
            self.last_line = time.monotonic()
            left = (self.last_line - self.began) / max(self.last - self.first, 1) * (self.steps - self.last)
            info(f"step {self.last} of {self.steps}: loss {loss:.4f}, {rate:,.0f} tokens/s, {clock(left)} left")

    def measuring(self, done: int, batches: int) -> None:
        """Show how many batches of an evaluation are done."""
        now = time.monotonic()
        self.last_line = self.last_line or now
        if now - self.last_line >= LINE_INTERVAL:
            self.last_line = now
            info(f"measuring the held-out loss: {done} of {batches} batches")

    def step(self, step: int) -> None:
        """Show the number of the last step."""
        self.last = step
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def clock(seconds: float) -> str:
    """Format a duration as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
