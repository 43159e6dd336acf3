"""A plan as text: a table for people, and the lines that a run logs before it starts."""

from __future__ import annotations

from collections.abc import Iterator

from lorakeet.plan.plan import Plan

#: Kinds of memory in the order of the table, and what each is.
KINDS = {
    "software": "Python, torch and other libraries, data",
    "base": "frozen weights",
    "adapter": "trained weights",
    "gradients": "of the trained weights",
    "optimizer": "two moments of each trained weight",
    "activations": "kept for the backward pass",
    "transient": "short-lived, at the peak",
    "logits": "at a time, with their gradient",
    "planning": "beyond the software, while a few layers are measured",
    "loading": "beyond the base, while it is read",
    "evaluation": "of its largest pass",
}


def size(count: float) -> str:
    """Return bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return a time in the unit that reads well."""
    for limit, unit, factor in ((120, "s", 1), (7200, "min", 60), (float("inf"), "h", 3600)):
        if seconds < limit:
            return f"{seconds / factor:.2g} {unit}" if seconds < 10 else f"{seconds / factor:.0f} {unit}"
    raise AssertionError(seconds)


def checkpointed(every: int | None, layers: int) -> str:
    """Return which layers are checkpointed, for example ``layers 0, 2, 4, … are checkpointed``."""
    if every is None:
        return "no layer is checkpointed"
    numbers = [str(number) for number in range(0, layers, every)]
    some = ", ".join([*numbers[:3], *["…"] * (len(numbers) > 3)])
    which = "all layers are" if every == 1 else f"layers {some} are" if len(numbers) > 1 else "layer 0 is"
    return f"{which} checkpointed"


def table(plan: Plan) -> Iterator[str]:
    """Yield the lines of a table: memory by kind, peaks, time and disk."""
    for name, what in KINDS.items():
        yield f"{name:<12} {size(getattr(plan.memory, name)):>10}  {what}"
    for phase, peak in plan.memory.peaks.items():
        yield f"peak, {phase:<10} {size(peak):>6}"
    yield from lines(plan)


def lines(plan: Plan) -> Iterator[str]:
    """Yield the few lines of a plan that a run logs."""
    peaks = plan.memory.peaks
    phase = max(peaks, key=peaks.__getitem__)
    free = "" if plan.limit is None else f" of {size(plan.limit)} that it may have"
    yield f"memory     {size(plan.memory.peak)}{free}, the most while {_DURING[phase]}: {_largest_kinds(plan)}"
    each = f"{duration(plan.step_seconds)} a step of {plan.step_tokens:,.0f} tokens"
    evaluations = f" and {plan.evaluations} evaluations" if plan.evaluations else ""
    yield f"time       {each}, {duration(plan.total_seconds)} for {plan.steps:,} steps{evaluations}"
    disk = f"{plan.checkpoints} checkpoints of {size(plan.checkpoint_bytes)}" if plan.checkpoints else "no checkpoints"
    yield f"disk       {size(plan.disk_bytes)}: adapter {size(plan.adapter_bytes)}, {disk}"


_DURING = {
    "planning": "the plan is made",
    "loading": "the base is loaded",
    "training": "training",
    "evaluation": "evaluating",
}


def _largest_kinds(plan: Plan) -> str:
    memory = plan.memory
    kinds = {
        "software": memory.software,
        "base": memory.base,
        "activations": memory.activations + memory.transient,
        "adapter with optimizer": memory.adapter + memory.gradients + memory.optimizer,
    }
    return ", ".join(f"{name} {size(count)}" for name, count in kinds.items() if count)


def without_checkpoints(plan: Plan) -> str | None:
    """Return the line on layers that are checkpointed because memory is short; None if none is."""
    if plan.every is None or plan.limit is None:
        return None
    need = plan.without_checkpointing
    return (
        f"memory     {checkpointed(plan.every, plan.layers)}: a pass of {plan.largest_pass:,} tokens would need "
        f"{size(need)} in all, {size(plan.limit)} are free"
    )
