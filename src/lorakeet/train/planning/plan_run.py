"""Plan of a run: what it trains, its memory by kind, its time and its disk space."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lorakeet._optional_imports import has_compiler
from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.checkpoint_files import weight_files
from lorakeet.base.device_dtype import choose_device
from lorakeet.base.load import ModelInfo
from lorakeet.base.source import find_source, local_folder
from lorakeet.base.storage import widest_format
from lorakeet.config import BaseSettings, RunConfig, TaskSettings
from lorakeet.data.prepared import Prepared
from lorakeet.errors import BaseModelError
from lorakeet.log import silent
from lorakeet.lora.lifecycle.frozen_a import freeze_lora_a
from lorakeet.plan.cut_model import whole_model
from lorakeet.plan.free_memory import free_memory
from lorakeet.plan.pass_cost import PassCost, choose_every, seconds_of
from lorakeet.plan.passes import Pass, count_steps, evaluation_passes, largest_pass, training_passes, typical_passes
from lorakeet.plan.plan import COMPILER_BYTES, HEAP, LATER_BYTES, SHARE, Memory, Plan
from lorakeet.quant.protocol import has_rounded
from lorakeet.runs.process_memory import peak_since_restart, resident_bytes, restart_peak, return_free_memory
from lorakeet.tasks.task import Task
from lorakeet.train.guards.preflight import checkpoint_bytes
from lorakeet.train.planning.pass_meter import PassMeter
from lorakeet.train.planning.rows import Rows, rows_of

#: Seconds of a step outside of its passes: reading rows, clipping, logging; and of AdamW per trained parameter.
STEP_SECONDS, PARAMETER_SECONDS = 0.01, 2e-9
#: Bytes of mapped files that are resident while a base is quantized, at most.
MAPPED_BYTES = 1 << 26


@dataclass(frozen=True)
class Weights:
    """Weights of a run.

    Attributes:
        trained, total: Numbers of parameters, tied ones counted once.
        base, adapter: Bytes of frozen and of trained weights.
        largest: Elements of the largest frozen weight.
        quantized: Whether layers are in 8 or 4 bits.
        loading: Bytes beyond the base while it is loaded.
        checkpoint: Bytes of a checkpoint.
    """

    trained: int
    total: int
    base: int
    adapter: int
    largest: int
    quantized: bool
    loading: int
    checkpoint: int

    @classmethod
    def of(cls, model: PeftModel, settings: BaseSettings, device: torch.device) -> Weights:
        """Return the weights of a model on the meta device, whose base ``settings`` load on ``device``."""
        trained, total = model.get_nb_trainable_parameters()
        frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
        adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        largest = max((t.numel() for t in frozen), default=0)
        made = cls(
            trained,
            total,
            sum(t.nbytes for t in frozen),
            adapter,
            largest,
            has_rounded(model),
            0,
            checkpoint_bytes(model),
        )
        return replace(made, loading=_loading(made, model, settings, device))


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
    weights, costs = _measured(config, found, chosen, task, rows, processes)
    gc.collect()  # a model refers to itself
    return_free_memory()
    free = free_memory(costs.device) if free is None else free
    memory = _memory(config, weights, costs, used, processes)
    every = _every(config, costs, memory, limit, used, free)
    train = config.train
    count = count_steps(len(rows.lengths), train, processes)
    between = (count - 1) // train.eval_every if train.eval_every else 0
    return Plan(
        trainable_parameters=weights.trained,
        all_parameters=weights.total,
        memory=_with_pass(memory, costs.largest, every),
        used=used,
        free=free,
        device=str(costs.device),
        every=every,
        layers=costs.largest.layers,
        largest_pass=costs.largest.tokens,
        step_tokens=costs.step_tokens,
        step_seconds=costs.step_seconds(every) + STEP_SECONDS + PARAMETER_SECONDS * weights.trained,
        steps=count,
        evaluation_seconds=costs.evaluation_seconds,
        evaluations=2 + between if costs.held_out else 0,
        adapter_bytes=weights.adapter,
        checkpoint_bytes=weights.checkpoint,
        checkpoints=3 if train.save_every else 0,
        without_checkpointing=memory.peak,
    )


@dataclass(frozen=True)
class Costs:
    """Costs of the passes of a run.

    Attributes:
        steps: Passes of each step.
        passes: Costs of the largest pass and of typical ones.
        largest: Cost of the largest pass that may come.
        held_out: Passes of an evaluation, the largest first.
        evaluation: Cost of the first of them; empty without held-out rows.
        device: Device of the run.
        can_checkpoint: Whether layers of the model can be checkpointed.
        measuring: Bytes that the process took at most, beyond those before, to measure this.
    """

    steps: list[list[Pass]]
    passes: list[PassCost]
    largest: PassCost
    held_out: list[Pass]
    evaluation: list[PassCost]
    device: torch.device
    can_checkpoint: bool
    measuring: int

    @classmethod
    def of(cls, meter: PassMeter, config: RunConfig, rows: Rows, processes: int) -> Costs:
        """Measure the costs, or read them from the cache.

        Args:
            meter: Meter of the run.
            config: Settings of the run.
            rows: Its samples.
            processes: Processes that share a step.
        """
        how = (meter.join, meter.skips_padding)
        with meter.undo:
            steps = training_passes(rows.lengths, config.train, *how, processes)
            largest = largest_pass(rows.lengths, config.train, *how, processes, not rows.is_stream)
            passes = [meter.cost(each) for each in typical_passes(steps, largest)]
            held_out = evaluation_passes(rows.held_out_lengths, config.train.batch_size, *how)
            evaluation = [meter.evaluation_cost(held_out[0])] if held_out else []
        most = passes[0].grown(rows.growth)
        return cls(steps, passes, most, held_out, evaluation, meter.device, meter.can_checkpoint, 0)

    @property
    def step_tokens(self) -> float:
        """Tokens of a step, on average."""
        return sum(each.tokens for step in self.steps for each in step) / len(self.steps)

    def step_seconds(self, every: int | None) -> float:
        """Return the time of the passes of a step, on average; layers 0, n, 2n, … are checkpointed."""
        tokens = [each.tokens for step in self.steps for each in step]
        return seconds_of(tokens, self.passes, every) / len(self.steps)

    @property
    def evaluation_seconds(self) -> float:
        """Time of an evaluation."""
        return seconds_of([each.tokens for each in self.held_out], self.evaluation) if self.evaluation else 0.0


def _measured(
    config: RunConfig, found: ModelInfo, chosen: TaskSettings, task: Task, rows: Rows, processes: int
) -> tuple[Weights, Costs]:
    """Return what the run trains, and the costs of its passes; the model that was measured is gone then."""
    restart_peak()
    before = resident_bytes()
    model = whole_model(config, found, task)
    if config.train.lorafa:
        freeze_lora_a(model)
    weights = Weights.of(model, config.base, choose_device(config.base.device))
    with silent():
        costs = Costs.of(PassMeter(config, model, found, chosen, task, rows), config, rows, processes)
    return weights, replace(costs, measuring=peak_since_restart() - before)


def _memory(config: RunConfig, weights: Weights, costs: Costs, used: int, processes: int) -> Memory:
    """Return the memory of a run without checkpointed layers."""
    on_gpu, heap = costs.device.type == "cuda", HEAP if costs.device.type == "cpu" else 1.0
    base = weights.base // (processes if config.train.fsdp else 1)
    software = 0 if on_gpu else used + LATER_BYTES
    return _with_pass(
        Memory(
            software=software,
            base=base,
            adapter=weights.adapter,
            gradients=weights.adapter * (2 if processes > 1 else 1),  # and the buckets in which they are sent
            optimizer=(16 if config.lora.adalora_config else 8) * weights.trained,  # and AdaLoRA's two averages
            activations=0,
            logits=0,
            transient=0,
            loading=weights.loading + weights.base - base,  # each process reads the whole base before it is sharded
            evaluation=int(heap * max((cost.peak() for cost in costs.evaluation), default=0)),
            planning=0 if on_gpu else max(used + costs.measuring - software, 0),
            heap=heap,
        ),
        costs.largest,
        None,
    )


def _with_pass(memory: Memory, largest: PassCost, every: int | None) -> Memory:
    """Return the memory with the largest pass, of which layers 0, n, 2n, … are checkpointed."""
    peak, kept = largest.peak(every) * memory.heap, largest.kept(every) * memory.heap
    compiler = COMPILER_BYTES if every and memory.software and not has_compiler() else 0
    return replace(
        memory,
        software=memory.software + compiler,
        activations=int(kept),
        logits=largest.peak_outside(),
        transient=int(peak - kept),
    )


def _every(
    config: RunConfig, costs: Costs, memory: Memory, limit: int | None, used: int, free: int | None
) -> int | None:
    """Return n if layers 0, n, 2n, … are checkpointed: as set, or as memory needs; None: no layer is."""
    wanted = config.train.gradient_checkpointing
    if wanted != "auto":
        return int(wanted) or None
    if not costs.can_checkpoint or (free is None and limit is None):
        return None
    available = limit - memory.fixed if limit is not None else SHARE * (free or 0) - (memory.fixed - used)
    return choose_every(costs.largest, available / memory.heap)


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
    if weights.quantized and size > 1.5 * weights.base:  # not stored quantized
        return 4 * weights.largest + min(MAPPED_BYTES, size)
    dtypes = {p.dtype for p in model.parameters() if not p.requires_grad}
    return size if stored is not None and not weights.quantized and stored not in dtypes else 0
