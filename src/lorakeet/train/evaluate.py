"""The held-out loop of trainings and of ``lorakeet eval``: one loss per target, however samples fall into batches.

A mean of batch means changes with the batch size and the order. Here losses are summed, and divided once by the number
of targets. Both callers sort the samples, share passes and leave out padding alike, so their figures are equal.

Under several processes each one collates all batches and runs its share of the passes. So the passes are those of a single
process, and their sums are added in the same order. No sample is run twice to even out the processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import datasets
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lorakeet.errors import DataError
from lorakeet.patches.fused_decoder import fused_decoder_layers
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.padding_free import is_padding_free, padding_free, why_padded
from lorakeet.patches.thread_order import in_fixed_order
from lorakeet.quant.protocol import computing_dtypes
from lorakeet.rng import same_random_state
from lorakeet.tasks.measure import Measure, Sums, measure_for
from lorakeet.tasks.task import Task
from lorakeet.train.microbatch_packing import evaluation_passes, join_batches, padding_token, why_model_separates
from lorakeet.train.step_state import Batch

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


@torch.no_grad()
def held_out_sums(
    model: nn.Module,
    passes: Iterable[list[Batch]],
    score: Callable[[list[Batch], int], Sums],
    after_batch: Callable[[], None],
    process: tuple[int, int] = (0, 1),
) -> Sums:
    """Return the sums over all passes, the same in every process; leaves the model in evaluation mode.

    Args:
        model: The model that ``score`` runs.
        passes: All batches, those that share a forward pass together.
        score: Runs one pass, given its batches and the number of samples before them.
        after_batch: Called once for each batch, whichever process runs it.
        process: Rank of this process, and how many there are.
    """
    model.eval()
    rank, processes = process
    found: dict[int, Sums] = {}
    batches, count, samples = list[Batch](), 0, 0
    for count, batches in enumerate(passes, start=1):
        if (count - 1) % processes == rank:
            found[count - 1] = score(batches, samples)
        samples += sum(len(batch["input_ids"]) for batch in batches)
        for _ in batches:
            after_batch()
    if 0 < count % processes <= rank:  # sharded weights are gathered by all processes in each pass
        score(batches, samples)
    sums = Sums()
    for _, of_pass in sorted(_of_all_processes(found, processes).items()):
        sums.add(of_pass)
    return sums


def all_batches(loader: Any, batch_size: int, processes: int) -> Iterable[Batch]:
    """Return the batches of a loader before accelerate shares its samples out to processes, which repeats some.

    Args:
        loader: A data loader that accelerate has prepared.
        batch_size: Rows per batch, of a stream.
        processes: How many there are.
    """
    if processes == 1:
        return loader
    data, sampler = loader.dataset, loader.batch_sampler
    data = data.dataset if isinstance(data, IterableDatasetShard) else data
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size, collate_fn=loader.collate_fn)
    while isinstance(sampler, BatchSamplerShard):
        sampler = sampler.batch_sampler
    return DataLoader(data, batch_sampler=sampler, collate_fn=loader.collate_fn)


def longest_first(rows: Any) -> Any:
    """Return the rows by falling length: little padding, and a lack of memory shows at once."""
    lengths = lengths_of(rows)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return rows.select(order) if isinstance(rows, datasets.Dataset) else [rows[i] for i in order]


def lengths_of(rows: Any) -> list[int]:
    """Return the tokens of each row: the column ``length`` where there is one, else those of ``input_ids``."""
    is_dataset = isinstance(rows, datasets.Dataset)
    if is_dataset and "length" in rows.column_names:
        found: list[int] = rows["length"][:]
        return found
    return [len(ids) for ids in (rows["input_ids"] if is_dataset else (row["input_ids"] for row in rows))]


def evaluate(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    collator: Collator,
    batch_size: int = 8,
    *,
    task: Task | None = None,
    tokenizer: Any = None,
    answers: Sequence[Mapping[str, Any]] | None = None,
    token_budget: int = 0,
    skip_padding: bool = True,
    seed: int = 42,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the loss per target and the figures of a task, outside of a training.

    Padding is not computed and logits are not held whole where the model allows it. Under several processes each takes
    its share, and all return the same figures. Training mode and random state are restored.

    Args:
        model: A model of transformers, with an adapter or without.
        dataset: Rows with ``input_ids`` (a ``datasets.Dataset`` or any sequence).
        collator: Makes a batch with the task's labels from rows.
        batch_size: Rows per batch.
        task: The task; left out: causal language modelling.
        tokenizer: Decodes the texts that a task's figures compare.
        answers: Rows with ``context`` and ``answers``, as the samples of QUESTION_ANS number them.
        token_budget: Real tokens of a forward pass that batches of a language model may share; 0: no sharing.
        skip_padding: Do not compute padding where the architecture allows it.
        seed: Of masks that the collator draws, as in a run.
        progress: Called after each batch with rows done and rows in total (of all processes).

    Returns:
        ``{"loss", "perplexity", "tokens"}``, loss in nats per token; for other tasks the task's figures.

    Raises:
        DataError: There are no rows, or no row has a target.
    """
    if not len(dataset):
        raise DataError("there is nothing to evaluate: the data has no samples", "give data with rows")
    task = task or Task()
    process = _rank_and_world()
    rows = longest_first(dataset)
    measure = measure_for(task, tokenizer, answers)
    with _evaluating(model, skip_padding):
        if task.name != "CAUSAL_LM":
            torch.manual_seed(seed)  # the same tokens are masked in every measurement
        loader = DataLoader(rows, batch_size=batch_size, collate_fn=collator)
        joins = task.name == "CAUSAL_LM" and why_model_separates(model) is None
        passes = evaluation_passes(loader, token_budget if joins else 0, padding_token(model, tokenizer)[1])
        after_batch = _counter(batch_size, len(rows), progress)
        sums = held_out_sums(model, passes, _scorer(model, measure, tokenizer), after_batch, process)
        if not sums.targets:
            raise DataError(
                "there is nothing to evaluate: no token of the data is a target", "check data.learn and data.max_length"
            )
        return measure.figures(sums)


@contextmanager
def _evaluating(model: nn.Module, skip_padding: bool) -> Iterator[None]:
    """Compute fast, draw no random number from the caller, and restore the training mode of ``model``."""
    was_training = model.training
    try:
        with ExitStack() as stack:
            stack.enter_context(same_random_state())
            stack.enter_context(in_fixed_order(model))
            if skip_padding and not is_padding_free(model) and why_padded(model) is None:
                stack.enter_context(padding_free(model))
            stack.enter_context(fused_loss(model))
            stack.enter_context(fused_decoder_layers(model))
            yield
    finally:
        model.train(was_training)


def _counter(batch_size: int, total: int, progress: Callable[[int, int], None] | None) -> Callable[[], None]:
    """Return the function that reports the rows done after each batch."""
    batches = itertools.count(1)

    def after_batch() -> None:
        done = next(batches) * batch_size
        if progress is not None:
            progress(min(done, total), total)

    return after_batch


def _scorer(model: nn.Module, measure: Measure, tokenizer: Any) -> Callable[[list[Batch], int], Sums]:
    """Return the function that moves the batches of a pass to the model, joins and scores them."""
    device = next(model.parameters()).device
    pad_token_id, _ = padding_token(model, tokenizer)

    def score(batches: list[Batch], before: int) -> Sums:
        batch = batches[0] if len(batches) == 1 else join_batches(batches, pad_token_id)
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        with autocast_of(model, device):
            return measure.score(model, batch, before)

    return score


def autocast_of(model: nn.Module, device: torch.device) -> Any:
    """Return the autocast of a training on this model: bf16 or fp16 where a layer computes in it."""
    half = computing_dtypes(model) & {torch.bfloat16, torch.float16}
    return torch.autocast(device.type, dtype=half.pop()) if len(half) == 1 else nullcontext()


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _of_all_processes(found: dict[int, Sums], processes: int) -> dict[int, Sums]:
    """Return the sums of every pass, by its number."""
    if processes == 1:
        return found
    parts: list[Any] = [None] * processes
    torch.distributed.all_gather_object(parts, found)
    return {number: sums for part in parts for number, sums in part.items()}
