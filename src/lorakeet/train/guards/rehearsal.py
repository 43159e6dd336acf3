"""Rehearsal of a training before its first step: the longest pass, an evaluation and a checkpoint.

Memory that runs out, or a disk that cannot be written, shows in the first seconds and not in the night. The rehearsal
leaves nothing behind: random states, gradients, buffers and training mode are those from before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import datasets
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lorakeet.log import info
from lorakeet.patches.padding_free import is_padding_free
from lorakeet.plan.passes import MOST_STEPS, passes_of
from lorakeet.rng import same_random_state
from lorakeet.train.evaluate import lengths_of, longest_first
from lorakeet.train.guards.sample_order import all_steps, has_known_order
from lorakeet.train.microbatch_packing import batches_per_pass

#: A :class:`lorakeet.train.trainer.Trainer`, which is made above this module.
Trainer = Any
#: Samples of a stream from whose beginning the longest are taken.
INSPECTED = 64


def rehearse(trainer: Trainer) -> None:
    """Write a checkpoint aside, evaluate the longest samples and run the longest pass; log what was done and how long.

    Raises:
        OutputError: The output folder cannot be written, or has no space for a checkpoint.
        TrainingError: Memory runs out.
    """
    began = time.perf_counter()
    done = [trainer.rehearse_saving()]
    with same_random_state(), same_state(trainer.model):
        done += [_evaluation(trainer), _training_pass(trainer)]
    if trainer.args.process_index == 0 and any(done):
        info(f"rehearsed  {', '.join(filter(None, done))}: {time.perf_counter() - began:.1f} s")


@contextmanager
def same_state(model: nn.Module) -> Iterator[None]:
    """Restore buffers and training mode of a model at the end: a batch norm, for instance, counts what it sees."""
    buffers = [
        (module, name, b, b.clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    longest = [(m, m.max_seq_len_cached) for m in model.modules() if hasattr(m, "max_seq_len_cached")]  # rotary
    try:
        yield
    finally:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
        for module, mode in modes:
            module.training = mode
        for module, length in longest:
            module.max_seq_len_cached = length


@torch.no_grad()
def _evaluation(trainer: Trainer) -> str | None:
    """Evaluate a batch of the longest samples of each held-out set."""
    if trainer.args.eval_strategy == "no":
        return None
    sets = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    trainer.model.eval()
    what = "an evaluation of the longest samples"
    with trainer.memory_errors_in(f"the rehearsal of {what}, before the first step"), trainer.accelerator.autocast():
        batches = [batch for each in sets for batch in _longest(trainer, each, trainer.args.eval_batch_size, 1)]
        for batch in batches:
            trainer.evaluate_batch(trainer._prepare_inputs(batch))
    return what if batches else None


def _training_pass(trainer: Trainer) -> str | None:
    """Run the largest pass of all steps, forward and backward, beside the moments that the optimizer will have."""
    args = trainer.args
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine has a backward pass of its own
        return None
    batches = _largest_step(trainer) or _longest(
        trainer, trainer.train_dataset, args.per_device_train_batch_size, args.gradient_accumulation_steps
    )
    if not batches:
        return None
    batch = trainer.largest_pass(batches)
    what = f"the longest pass of {computed_tokens(trainer.model, batch):,} tokens"
    trainer.model.train()
    with ExitStack() as around:
        around.enter_context(trainer.memory_errors_in(f"the rehearsal of {what}, before the first step"))
        around.enter_context(trainer.accelerator.no_sync(trainer.model_wrapped))
        around.callback(trainer.model_wrapped.zero_grad)
        moments = [p.new_ones(p.shape) for p in trainer.model.parameters() if p.requires_grad for _ in range(2)]
        loss = trainer.micro_batch_loss(batch, torch.tensor(1, device=args.device))
        if loss.requires_grad:
            loss.backward()
        del moments
    return what


def computed_tokens(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return the tokens of a batch that a model computes: real ones, and padding where that is computed."""
    masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
    if masks and is_padding_free(model):
        return sum(int(mask.sum()) for mask in masks)
    return max((value.numel() for value in masks or batch.values() if torch.is_tensor(value)), default=0)


def _largest_step(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Return the micro-batches of the step with the largest pass of all that will run; none where these are not known."""
    loader, accumulation = trainer.callback_handler.train_dataloader, trainer.args.gradient_accumulation_steps
    count = trainer.state.max_steps
    if not (_has_lengths(trainer.train_dataset) and 0 < count <= MOST_STEPS and has_known_order(loader)):
        return []
    lengths, skips_padding = lengths_of(trainer.train_dataset), is_padding_free(trainer.model)
    joins = trainer.token_budget and trainer.why_separate() is None

    def join(sizes: Sequence[Any]) -> Sequence[int]:
        return batches_per_pass(sizes, trainer.token_budget) if joins else [1] * len(sizes)

    steps = list(islice(all_steps(loader, accumulation), count))
    largest = [max(each.tokens for each in passes_of(step, lengths, join, skips_padding)) for step in steps]
    of_all = trainer.accelerator.gather(torch.tensor([largest], device=trainer.args.device)).amax(0)
    return _collated(trainer, trainer.train_dataset, steps[int(of_all.argmax())])


def _longest(trainer: Trainer, dataset: Any, batch_size: int, count: int) -> list[dict[str, Tensor]]:
    """Return micro-batches of the longest samples; none where the lengths are not known without reading all samples."""
    if isinstance(dataset, datasets.IterableDataset):
        head = list(islice(dataset, INSPECTED))
        rows = longest_first(head) if head and "input_ids" in head[0] else []
        chosen = rows[: batch_size * count]
        return [trainer.data_collator(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]
    if not _has_lengths(dataset):
        return []
    longest = longest_first(dataset).select(range(min(batch_size * count, len(dataset))))
    numbers = list(range(len(longest)))
    return _collated(trainer, longest, [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)])


def _has_lengths(dataset: Any) -> bool:
    """Whether the lengths of the samples are known without reading all of them."""
    return isinstance(dataset, datasets.Dataset) and bool({"input_ids", "length"} & set(dataset.column_names))


def _collated(trainer: Trainer, dataset: datasets.Dataset, batches: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """Return micro-batches of the samples with these numbers."""
    kept = trainer._remove_unused_columns(dataset, description="rehearsal")
    return [trainer.data_collator([kept[number] for number in numbers]) for numbers in batches]
