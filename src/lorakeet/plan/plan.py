"""The plan: memory by kind, peaks, time and disk of a training, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Share of the free memory that a training may take; kernels need workspace, and other processes run too.
SHARE = 0.85
#: Resident bytes per byte of live tensors on a CPU: the heap has holes. Measured: 0.97 to 1.1.
HEAP = 1.05
#: Bytes that a process takes after planning for more of Python's libraries: the loader, the Trainer, plots. Measured: 60 MB.
LATER_BYTES = 60_000_000
#: Bytes of torch's compiler, which its function for checkpointed layers imports. Measured: 97 MB.
COMPILER_BYTES = 100_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of a training by kind.

    Attributes:
        software: Python, torch and all libraries, data and tokenizer; 0 on a GPU, whose memory they do not take.
        base: Frozen weights.
        adapter: Trained weights.
        gradients: Of the trained weights.
        optimizer: Two moments of each trained weight.
        activations: Tensors that the largest pass keeps for its backward pass.
        logits: Logits of the loss that are in memory at a time, with their gradient.
        transient: Short-lived tensors at the peak of the largest pass, beyond what it keeps.
        loading: Bytes beyond the base while it is loaded.
        evaluation: Tensors of the largest pass of an evaluation.
        planning: Bytes beyond the software while a few layers are measured for the plan; 0 where costs were known.
        heap: Resident bytes per byte of live tensors; in activations, transient and evaluation already.
    """

    software: int
    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    transient: int
    loading: int
    evaluation: int
    planning: int = 0
    heap: float = 1.0

    @property
    def fixed(self) -> int:
        """Bytes that stay throughout the training, whatever a pass takes."""
        return self.software + self.base + self.adapter + self.gradients + self.optimizer

    @property
    def peaks(self) -> dict[str, int]:
        """Peak of each phase, the whole process."""
        return {
            "planning": self.software + self.planning,
            "loading": self.software + self.base + self.loading,
            "training": self.fixed + self.activations + self.transient,
            "evaluation": self.fixed + self.evaluation,
        }

    @property
    def peak(self) -> int:
        """Peak of the process."""
        return max(self.peaks.values())


@dataclass(frozen=True)
class Plan:
    """Prediction of a training.

    Attributes:
        trainable_parameters, all_parameters: Counts, tied parameters once.
        memory: Bytes by kind.
        used: Bytes that the process had when it was planned, a part of the software's.
        free: Free bytes of the device then; None if unknown.
        device: The device.
        every: Layers 0, n, 2n, … are checkpointed; None: no layer is.
        layers: Number of layers.
        largest_pass: Tokens of the largest pass.
        step_tokens: Real tokens of a step, on average.
        step_seconds: Time of a step, on average.
        steps: Optimizer steps.
        evaluation_seconds: Time of one evaluation.
        evaluations: How many there are.
        adapter_bytes, checkpoint_bytes: Disk space of the adapter and of one checkpoint.
        checkpoints: Checkpoints on disk at a time.
        without_checkpointing: Peak of the process if no layer is checkpointed.
    """

    trainable_parameters: int
    all_parameters: int
    memory: Memory
    used: int
    free: int | None
    device: str
    every: int | None
    layers: int
    largest_pass: int
    step_tokens: float
    step_seconds: float
    steps: int
    evaluation_seconds: float
    evaluations: int
    adapter_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    without_checkpointing: int

    @property
    def total_seconds(self) -> float:
        """Time of all steps and evaluations."""
        return self.steps * self.step_seconds + self.evaluations * self.evaluation_seconds

    @property
    def disk_bytes(self) -> int:
        """Disk space of the adapter and of the checkpoints that are kept."""
        return self.adapter_bytes + self.checkpoints * self.checkpoint_bytes

    @property
    def limit(self) -> int | None:
        """Most bytes that the process may have, by what is free; None if unknown."""
        return None if self.free is None else int(self.used + self.free)

    def fits(self, limit: int | None) -> bool:
        """Whether the predicted peak is within ``limit`` bytes; None: no limit."""
        return limit is None or self.memory.peak <= limit

    def figures(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        more = {
            "peak_bytes": self.memory.peak,
            "peaks": self.memory.peaks,
            "total_seconds": self.total_seconds,
            "disk_bytes": self.disk_bytes,
        }
        return asdict(self) | more


def compare(plan: Plan | None, peak_bytes: int, step_seconds: float | None) -> dict[str, Any]:
    """Return prediction and measurement side by side, for ``summary.json``.

    Args:
        plan: The plan; None if there was none.
        peak_bytes: Measured peak of the process, or on a GPU of its memory.
        step_seconds: Measured time of a step; None if unknown.
    """
    return {
        "step_seconds": step_seconds,
        "planned_peak_bytes": plan.memory.peak if plan else None,
        "planned_step_seconds": plan.step_seconds if plan else None,
        "planned_peak_ratio": plan.memory.peak / peak_bytes if plan else None,
        "planned_step_ratio": plan.step_seconds / step_seconds if plan and step_seconds else None,
    }


def step_seconds(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the time of a step from the lines of a metrics log, without the first line, whose steps are slower."""
    trained = [line for line in lines if "seconds" in line]
    if not trained:
        return None
    first, last = trained[0], trained[-1]
    if first["step"] == last["step"]:
        return float(last["seconds"] / last["step"])
    return float((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))
