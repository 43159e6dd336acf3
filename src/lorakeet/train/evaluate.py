"""The held-out loop of trainings and of ``lorakeet eval``: one loss per target, however samples fall into batches.

A mean of batch means changes with the batch size and the order. Here losses are summed, and divided once by the number
of targets. Both callers sort the samples, share passes and leave out padding alike, so their figures are equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader

from lorakeet.errors import DataError
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.padding_free import is_padding_free, padding_free, why_padded
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
    score: Callable[[list[Batch]], Sums],
    after_batch: Callable[[], None],
) -> Sums:
    """Return the sums over all passes; leaves the model in evaluation mode.

    Args:
        model: The model that ``score`` runs.
        passes: Batches, those that share a forward pass together.
        score: Runs one pass.
        after_batch: Called once for each batch of a pass that has run.
    """
    model.eval()
    sums = Sums()
    for batches in passes:
        sums.add(score(batches))
        for _ in batches:
            after_batch()
    return sums


def gather_samples(accelerator: Any, values: Any) -> Any:
    """Gather values of samples from all processes, without the samples that only fill up the last batch."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.gather_for_metrics(values, use_gather_object=isinstance(values, list))


def longest_first(rows: Any) -> Any:
    """Return the rows by falling length: little padding, and a lack of memory shows at once.

    The length is the column ``length`` where there is one, else that of ``input_ids``.
    """
    is_dataset = isinstance(rows, datasets.Dataset)
    if is_dataset and "length" in rows.column_names:
        lengths = rows["length"][:]
    else:
        lengths = [len(ids) for ids in (rows["input_ids"] if is_dataset else (row["input_ids"] for row in rows))]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return rows.select(order) if is_dataset else [rows[i] for i in order]


def evaluate(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    collator: Collator,
    batch_size: int = 8,
    *,
    task: Task | None = None,
    tokenizer: Any = None,
    token_budget: int = 0,
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
        token_budget: Real tokens of a forward pass that batches of a language model may share; 0: no sharing.
        seed: Of masks that the collator draws, as in a run.
        progress: Called after each batch with rows done and rows in total (of this process).

    Returns:
        ``{"loss", "perplexity", "tokens"}``, loss in nats per token; for other tasks the task's figures.

    Raises:
        DataError: There are no rows, or no row has a target.
    """
    if not len(dataset):
        raise DataError("there is nothing to evaluate: the data has no samples", "give data with rows")
    task = task or Task()
    rank, world = _rank_and_world()
    rows = longest_first(dataset)
    rows = rows.select(range(rank, len(rows), world)) if isinstance(rows, datasets.Dataset) else rows[rank::world]
    measure = measure_for(task, tokenizer)
    with _evaluating(model):
        if task.name != "CAUSAL_LM":
            torch.manual_seed(seed)  # the same tokens are masked in every measurement
        loader = DataLoader(rows, batch_size=batch_size, collate_fn=collator)
        joins = task.name == "CAUSAL_LM" and world == 1 and why_model_separates(model) is None
        passes = evaluation_passes(loader, token_budget if joins else 0, padding_token(model, tokenizer)[1])
        after_batch = _counter(batch_size, len(rows), progress)
        sums = held_out_sums(model, passes, _scorer(model, measure, tokenizer), after_batch)
        sums = _of_all_processes(sums, world)
        if not sums.targets:
            raise DataError(
                "there is nothing to evaluate: no token of the data is a target", "check data.learn and data.max_length"
            )
        return measure.figures(sums)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Compute fast, draw no random number from the caller, and restore the training mode of ``model``."""
    was_training = model.training
    try:
        with ExitStack() as stack:
            stack.enter_context(same_random_state())
            if not is_padding_free(model) and why_padded(model) is None:
                stack.enter_context(padding_free(model))
            stack.enter_context(fused_loss(model))
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


def _scorer(model: nn.Module, measure: Measure, tokenizer: Any) -> Callable[[list[Batch]], Sums]:
    """Return the function that moves the batches of a pass to the model, joins and scores them."""
    device = next(model.parameters()).device
    pad_token_id, _ = padding_token(model, tokenizer)

    def score(batches: list[Batch]) -> Sums:
        batch = batches[0] if len(batches) == 1 else join_batches(batches, pad_token_id)
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        with _autocast(model, device):
            return measure.score(model, batch)

    return score


def _autocast(model: nn.Module, device: torch.device) -> Any:
    """Return the autocast of a training on this model: bf16 or fp16 where a weight has that type."""
    half = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    return torch.autocast(device.type, dtype=half.pop()) if len(half) == 1 else nullcontext()


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _of_all_processes(sums: Sums, world: int) -> Sums:
    """Return the sums of all processes together, the same in each."""
    if world == 1:
        return sums
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, sums)
    together = Sums()
    for part in parts:
        together.add(part)
    return together
