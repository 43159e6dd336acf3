"""Files that a run writes at its end: the adapter, its figures and plots; and the disk space that it needs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.adapter.serialization import add_notes
from lorakeet.base.load import Base
from lorakeet.config import RunConfig, TaskSettings
from lorakeet.data.prepared import Prepared
from lorakeet.errors import OutputError
from lorakeet.files import write_elsewhere, write_folder, write_json
from lorakeet.log import info
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.taken_part import holds_parts
from lorakeet.plan.plan import Plan, compare, step_seconds
from lorakeet.tasks.task import Task
from lorakeet.tasks.taught import NOTES, taught_notes
from lorakeet.train.callbacks.progress import ProgressCallback
from lorakeet.train.callbacks.spectrum import verdict
from lorakeet.train.checkpoints.run_start import remove_what_only_resumes
from lorakeet.train.guards.preflight import checkpoint_bytes
from lorakeet.train.summary import Progress, compare_figures, samples_seen, summarize
from lorakeet.train.trainer import Trainer

#: Bytes of a run's small files at most: figures, plots, settings, model card. Measured: 0.2 MB for 200 steps.
FIGURES_BYTES = 300_000


@dataclass
class RunOutput:
    """Everything that a run works with, checked and loaded, and the files that it writes at its end."""

    config: RunConfig
    folder: Path
    base: Base
    model: PeftModel
    data: Prepared
    chosen: TaskSettings
    task: Task
    args: TrainingArguments
    began: float
    plan: Plan | None = None

    def bytes_to_write(self, resume: bool) -> int:
        """Return the disk space that the run needs: the adapter with its tokenizer, figures, and checkpoints.

        Args:
            resume: Whether the checkpoints of an earlier session are there already; they are replaced.
        """
        train, kept = self.config.train, self.args.save_total_limit
        checkpoints = 0 if train.save_every is None and not train.save_minutes else 1 if resume else kept + 1
        backend = getattr(self.base.tokenizer, "backend_tokenizer", None)
        tokenizer = len(backend.to_str().encode()) if backend is not None else 0
        adapter = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        adapter *= 2 if holds_parts(self.model, "default") else 1  # saved as plain LoRA of twice the rank
        return adapter + tokenizer + FIGURES_BYTES + checkpoints * checkpoint_bytes(self.model)

    def summary(self, trainer: Trainer, progress: ProgressCallback) -> dict[str, Any]:
        """Return the contents of ``summary.json``."""
        train, report, steps = self.config.train, self.data.report, trainer.state.global_step
        per_step = train.batch_size * train.grad_accum * self.args.world_size
        done = Progress(
            steps=steps,
            samples=samples_seen(steps, report.train_samples, per_step),
            tokens=trainer.state.num_input_tokens_seen,
            train_seconds=progress.seconds,
            wall_seconds=progress.earlier_seconds + time.perf_counter() - self.began,
        )
        settings = {
            "bits": self.config.base.bits,
            "device": str(self.args.device),
            "processes": self.args.world_size,
            "seed": train.seed,
        }
        best = self.best_step(trainer)
        lines = [line for line in progress.log.read() if best is None or line["step"] <= best or "loss" in line]
        figures = summarize(self.folder, self.base, self.model, self.task, self.data, done, settings, lines)
        peak = figures["peak_device_bytes"] or figures["peak_rss_bytes"]
        figures |= compare(self.plan, peak, step_seconds(progress.log.read()))
        return {**figures, **({} if best is None else {"best_step": best})}

    def best_step(self, trainer: Trainer) -> int | None:
        """Return the step that the adapter at the end is from, where it is an earlier one than the last."""
        best: int | None = trainer.state.best_global_step
        return best if self.config.train.load_best and best != trainer.state.global_step else None

    def save_adapter(self) -> None:
        """Write the adapter, complete or not at all; elsewhere, if the run's folder has no room.

        Raises:
            OutputError: The run's folder has no room; the message says where the adapter is.
        """
        if self.args.process_index == 0:
            try:
                with write_folder(self.folder / "adapter") as aside:
                    self._write_adapter(aside)
            except OutputError as error:
                raise self.rescue(error) from error
            info(f"adapter    {self.folder / 'adapter'}")

    def _write_adapter(self, folder: Path) -> None:
        """Write the adapter with its tokenizer and chat template."""
        taught = taught_notes(self.config, self.data.layout, self.data.chat)
        origin = {"task": self.task.notes(), "data": self.data.report.content_hash, NOTES: taught}
        self.model.save_pretrained(folder, notes=origin, plain_lora=True)
        self.base.tokenizer.save_pretrained(folder)

    def rescue(self, error: OutputError) -> OutputError:
        """Write the adapter where there is room; return the error that says where it is."""
        place = write_elsewhere(self.folder.resolve().name, self._write_adapter)
        if place is None:
            return OutputError(f"{error.message}, and there is no room elsewhere: the adapter is lost", error.hint)
        return OutputError(
            f"{error.message}; what was learned is saved in {place}",
            f"free some space, then move it: mv {place} {self.folder / 'adapter'}",
        )

    def finish(self, trainer: Trainer, summary: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        """Write the notes of the adapter, the plots and last the summary; log the figures."""
        from lorakeet.tasks.plots import draw_confusion, draw_loss_curve, draw_spectra  # which load matplotlib

        folder = self.folder / "adapter"
        add_notes(folder, PeftConfig.from_pretrained(folder), _notes(summary))
        title = f"{self.base.name}, r={self.config.lora.r}"
        draw_loss_curve(lines, self.folder / "loss_curve.png", title)
        if summary["spectrum"]:
            draw_spectra(lines, self.folder / "ranks.png", title)
        predictions = getattr(trainer, "predictions", None)
        if self.task.problem == "single_label" and predictions is not None and self.task.labels:
            best = predictions.predictions.argmax(-1)
            draw_confusion(predictions.label_ids, best, self.task.labels, self.folder / "confusion.png")
        write_json(self.folder / "summary.json", summary)
        remove_what_only_resumes(self.config, self.folder)
        for line in compare_figures(summary):
            info(line)
        if summary["spectrum"]:
            info(f"rank       {verdict(summary['spectrum'])[1]}")


def _notes(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures for the adapter's notes: not the path on this machine, nor what the notes have already."""
    return {key: value for key, value in summary.items() if key not in ("adapter_path", "task", "data")}
