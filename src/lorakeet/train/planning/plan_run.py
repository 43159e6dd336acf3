"""Plan of a run: what it trains, its memory by kind, its time and its disk space."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.checkpoint_files import weight_files
from lorakeet.base.load import ModelInfo
from lorakeet.base.source import find_source, local_folder
from lorakeet.base.storage import widest_format
from lorakeet.config import BaseSettings, RunConfig, TaskSettings
from lorakeet.data.prepared import Prepared
from lorakeet.errors import BaseModelError
from lorakeet.log import silent
from lorakeet.plan.cut_model import whole_model
from lorakeet.plan.free_memory import free_memory, resident_bytes
from lorakeet.plan.pass_cost import PassCost, choose_every, seconds_of
from lorakeet.plan.passes import count_steps, evaluation_passes, largest_pass, training_passes, typical_passes
from lorakeet.plan.plan import HEAP, LATER_BYTES, SHARE, Memory, Plan
from lorakeet.quant.protocol import has_quantized
from lorakeet.tasks.task import Task
from lorakeet.train.guards.preflight import checkpoint_bytes
from lorakeet.train.planning.pass_meter import PassMeter
from lorakeet.train.planning.rows import rows_of

#: Seconds of a step outside of its passes: reading rows, clipping, logging; and of AdamW per trained parameter.
STEP_SECONDS, PARAMETER_SECONDS = 0.01, 2e-9
#: Bytes of mapped files that stay resident while a base is quantized.
MAPPED_BYTES = 1 << 26


@dataclass(frozen=True)
class Weights:
    """Weights of a run.

    Attributes:
        trained, total: Numbers of parameters, tied ones counted once.
        base, adapter: Bytes of frozen and of trained weights.
        largest: Elements of the largest frozen weight.
        quantized: Whether layers are in 8 bits.
        checkpoint: Bytes of a checkpoint.
    """

    trained: int
    total: int
    base: int
    adapter: int
    largest: int
    quantized: bool
    checkpoint: int

    @classmethod
    def of(cls, model: PeftModel) -> Weights:
        """Return the weights of a model, which may be on the meta device."""
        trained, total = model.get_nb_trainable_parameters()
        frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
        adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        largest = max((t.numel() for t in frozen), default=0)
        return cls(
            trained,
            total,
            sum(t.nbytes for t in frozen),
            adapter,
            largest,
            has_quantized(model),
            checkpoint_bytes(model),
        )


def plan_run(
    config: RunConfig,
    found: ModelInfo,
    chosen: TaskSettings,
    data: Prepared | None = None,
    *,
    processes: int = 1,
    free: int | None = None,
    limit: int | None = None,
    used: int | None = None,
) -> Plan:
    """Plan a run; reads no weights and draws no random number from the caller.

    Args:
        config: Settings of the run; its length and learning rate are set.
        found: Configuration and tokenizer of the base.
        chosen: Settings of the task, whose type is concrete.
        data: Prepared data; None: samples of ``data.max_length`` tokens.
        processes: Processes that share a step.
        free: Free bytes of the device; None: as it is now.
        limit: Bytes that the process may have; None: a share of what is free.
        used: Bytes that the process has without what earlier plans left behind; None: as it is now.

    Raises:
        ConfigError: There is no data, and samples of the task cannot be made up.
    """
    used = resident_bytes() if used is None else used
    task = Task(chosen.type, data.problem, data.labels) if data is not None else Task(chosen.type)
    rows = rows_of(data, config, task.name)
    model = whole_model(config, found, task)
    weights = Weights.of(model)
    with silent():
        meter = PassMeter(config, model, found, chosen, task, rows)
        with meter.undo:
            steps = training_passes(rows.lengths, config.train, meter.join, meter.skips_padding, processes)
            longest = largest_pass(rows.lengths, config.train, meter.join, meter.skips_padding)
            costs = [meter.cost(each) for each in typical_passes(steps, longest)]
            held_out = evaluation_passes(
                rows.held_out_lengths, config.train.batch_size, meter.join, meter.skips_padding
            )
            evaluation = [meter.evaluation_cost(held_out[0])] if held_out else []
    free = free_memory(meter.device) if free is None else free
    largest = costs[0].grown(rows.growth)
    software = 0 if meter.device.type == "cuda" else used + LATER_BYTES
    heap = HEAP if meter.device.type == "cpu" else 1.0
    kept_of_base = weights.base // (processes if config.train.fsdp else 1)
    # each process reads the whole base before it is sharded
    loading = _loading(weights, model, config.base, meter.device) + weights.base - kept_of_base

    def memory(every: int | None) -> Memory:
        peak, kept = largest.peak(every) * heap, largest.kept(every) * heap
        return Memory(
            software=software,
            base=kept_of_base,
            adapter=weights.adapter,
            gradients=weights.adapter * (2 if processes > 1 else 1),  # and the buckets in which they are sent
            optimizer=8 * weights.trained,
            activations=int(kept),
            logits=largest.peak_outside(),
            transient=int(peak - kept),
            loading=loading,
            evaluation=int(heap * max((cost.peak() for cost in evaluation), default=0)),
        )

    every = _every(config, meter.can_checkpoint, largest, heap, memory(None), limit, used, free)
    seconds = [seconds_of([each.tokens for each in step], costs, every) for step in steps]
    of_step = sum(seconds) / len(seconds) + STEP_SECONDS + PARAMETER_SECONDS * weights.trained
    count = count_steps(len(rows.lengths), config.train, processes)
    between = (count - 1) // config.train.eval_every if config.train.eval_every else 0
    return Plan(
        trainable_parameters=weights.trained,
        all_parameters=weights.total,
        memory=memory(every),
        used=used,
        free=free,
        device=str(meter.device),
        every=every,
        layers=largest.layers,
        largest_pass=largest.tokens,
        step_tokens=sum(each.tokens for step in steps for each in step) / len(steps),
        step_seconds=of_step,
        steps=count,
        evaluation_seconds=seconds_of([each.tokens for each in held_out], evaluation) if held_out else 0.0,
        evaluations=2 + between if held_out else 0,
        adapter_bytes=weights.adapter,
        checkpoint_bytes=weights.checkpoint,
        checkpoints=3 if config.train.save_every else 0,
        without_checkpointing=memory(None).peak,
    )


def _every(
    config: RunConfig,
    can_checkpoint: bool,
    largest: PassCost,
    heap: float,
    memory: Memory,
    limit: int | None,
    used: int,
    free: int | None,
) -> int | None:
    """Return n if layers 0, n, 2n, … are checkpointed: as set, or as memory needs; None: no layer is."""
    wanted = config.train.gradient_checkpointing
    if wanted != "auto":
        return int(wanted) or None
    if not can_checkpoint or (free is None and limit is None):
        return None
    available = limit - memory.fixed if limit is not None else SHARE * (free or 0) - (memory.fixed - used)
    return choose_every(largest, available / heap)


def _loading(weights: Weights, model: nn.Module, base: BaseSettings, device: torch.device) -> int:
    """Return the bytes beyond the base while it is loaded: mapped files, and a weight that is quantized."""
    if device.type != "cpu":
        return 0
    try:
        source = find_source(base.model, base.revision)
        folder = local_folder(source) if source.kind == "gguf" else source.path
        files = weight_files(folder)
        stored = widest_format(folder) if files else None
    except BaseModelError:  # a configuration without a model: nothing is loaded
        return 0
    size = sum(Path(file).stat().st_size for file in files)
    if weights.quantized and size > 1.5 * weights.base:  # not stored in 8 bits
        return 4 * weights.largest + min(MAPPED_BYTES, size)
    dtypes = {p.dtype for p in model.parameters() if not p.requires_grad}
    return size if stored is not None and not weights.quantized and stored not in dtypes else 0
