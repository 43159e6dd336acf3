"""Packing of the micro-batches of one optimizer step into fewer, longer forward passes.

Without padding, a pass costs by its real tokens, and short passes cost more than their share: four passes of 200 tokens
take longer than one of 800. The step still sees the same samples, and its loss is the mean over all of its targets
however they fall into passes. So its gradient is the same. Memory grows with the tokens of a pass: a budget bounds
them, and a single micro-batch above the budget runs alone.

The loop of ``transformers.Trainer`` fetches all micro-batches of a step and then passes them on one by one. So passes
are planned when the batches are fetched. A micro-batch that waits returns the loss 0, and its pass returns the loss of
all micro-batches in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakeet.facts.padding import padding_token as chosen_padding_token
from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.log import info
from lorakeet.patches.causal_loss import count_targets, shifts_labels
from lorakeet.patches.fused_loss import computes_logits
from lorakeet.patches.padding_free import is_padding_free
from lorakeet.quant.protocol import computing_dtypes, has_rounded
from lorakeet.rng import same_random_state
from lorakeet.train.step_state import Batch, StepHost

#: Padding value of each column that may be joined; None: the padding token.
PADDING_VALUES: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "labels": IGNORE_INDEX,
    "shift_labels": IGNORE_INDEX,
    "token_type_ids": 0,
    "position_ids": 0,
}
#: Padded positions of a pass per real token of the budget: embeddings and last hidden states hold all positions.
POSITIONS_PER_TOKEN = 4
#: Tokens. Lengths of the two samples that test whether a loss is a mean over targets.
TEST_LENGTHS = (16, 7)
#: Tokens. A pass of this size keeps a CPU busy: larger products are hardly faster, and activations take memory.
CPU_BUDGET = 768
#: Tokens. The same for a quantized base, where the fixed cost of a pass is a larger share and more memory is free.
CPU_BUDGET_QUANTIZED = 1024


def default_token_budget(model: nn.Module, device: torch.device, micro_batch_tokens: int) -> int:
    """Return the real tokens of a pass that several micro-batches may share.

    Args:
        model: The model that runs the passes.
        device: Where it runs. A CPU gains nothing from passes above :data:`CPU_BUDGET`.
        micro_batch_tokens: Tokens of the largest micro-batch, batch size × longest sample.
    """
    if device.type != "cpu":
        return micro_batch_tokens
    return min(micro_batch_tokens, CPU_BUDGET_QUANTIZED if has_rounded(model) else CPU_BUDGET)


def can_join(batch: Batch, has_padding_token: bool = True) -> bool:
    """Whether a batch has only columns of :data:`PADDING_VALUES`, an attention mask, and a row for each sample.

    Without a padding token a sequence classifier accepts no rows of different lengths.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not (torch.is_tensor(ids) and torch.is_tensor(mask)) or ids.ndim != 2 or mask.shape != ids.shape:
        return False
    for name, value in batch.items():
        if name not in PADDING_VALUES or not torch.is_tensor(value):
            return False
        if value.ndim not in (1, 2) or len(value) != len(ids):
            return False
    labels = batch.get("labels")
    return has_padding_token or labels is None or _has_value_per_token(labels, ids)


def join_batches(batches: Sequence[Batch], pad_token_id: int) -> dict[str, Tensor]:
    """Return one batch with the samples of several, padded on the right to the longest.

    Padding inside a batch stays where it is, so positions do not change.

    Args:
        batches: Batches of the same columns that :func:`can_join` accepts.
        pad_token_id: Padding of ``input_ids``.
    """
    columns = max(batch["input_ids"].shape[1] for batch in batches)
    joined = {}
    for name, padding in PADDING_VALUES.items():
        if name not in batches[0]:
            continue
        values = [batch[name] for batch in batches]
        if all(_has_value_per_token(batch[name], batch["input_ids"]) for batch in batches):
            value = pad_token_id if padding is None else padding
            values = [F.pad(each, (0, columns - each.shape[1]), value=value) for each in values]
        joined[name] = torch.cat(values)
    return joined


def _has_value_per_token(value: Tensor, ids: Tensor) -> bool:
    """Whether a column has a value for each token; several labels of a sample have a row too, but of fractions."""
    return value.shape == ids.shape and not value.is_floating_point()


def batches_per_pass(sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Return the numbers of neighboring micro-batches in each pass: as many as the budget holds, at least one.

    Args:
        sizes: Real tokens, rows and columns of each micro-batch.
        budget: Real tokens of a pass. Its padded positions are at most :data:`POSITIONS_PER_TOKEN` times as many.
    """
    counts: list[int] = []
    tokens = rows = columns = 0
    for new_tokens, new_rows, new_columns in sizes:
        both = tokens + new_tokens, rows + new_rows, max(columns, new_columns)
        if counts and both[0] <= budget and both[1] * both[2] <= POSITIONS_PER_TOKEN * budget:
            counts[-1] += 1
            tokens, rows, columns = both
        else:
            counts.append(1)
            tokens, rows, columns = new_tokens, new_rows, new_columns
    return counts


def batch_sizes(batches: Sequence[Batch], budget: int, has_padding_token: bool) -> list[tuple[int, int, int]]:
    """Return real tokens, rows and columns of each batch; a batch that cannot be joined exceeds the budget."""
    sizes = []
    for batch in batches:
        fits = can_join(batch, has_padding_token) and set(batch) == set(batches[0])
        tokens = int(batch["attention_mask"].sum()) if fits else budget + 1
        sizes.append((tokens, *(batch["input_ids"].shape if fits else (1, 1))))
    return sizes


def evaluation_passes(batches: Iterable[Batch], budget: int, has_padding_token: bool) -> Iterator[list[Batch]]:
    """Yield the batches of an evaluation, neighbors that share a pass together.

    Args:
        batches: Batches whose rows have losses of their own.
        budget: Real tokens of a pass; 0: each batch has its own.
        has_padding_token: Whether the model itself names a padding token.
    """
    if not budget:
        yield from ([batch] for batch in batches)
        return
    together: list[Batch] = []
    for batch in batches:
        longer = [*together, batch]
        if together and len(batches_per_pass(batch_sizes(longer, budget, has_padding_token), budget)) > 1:
            yield together
            longer = [batch]
        together = longer
    if together:
        yield together


def padding_token(model: Any, tokenizer: Any) -> tuple[int, bool]:
    """Return the id that pads token ids, and whether the model itself names it."""
    own = chosen_padding_token(getattr(model, "config", None))
    return (chosen_padding_token(None, tokenizer) or 0, False) if own is None else (own, True)


def sample_prefix(batch: Batch, length: int) -> dict[str, Tensor]:
    """Return the first real tokens of a batch's longest sample, all of them targets where targets are tokens."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    row = int(mask.sum(1).argmax())
    positions = mask[row].nonzero()[:length, 0]
    prefix = {}
    for name, value in batch.items():
        per_token = _has_value_per_token(value, ids)
        prefix[name] = value[row : row + 1, positions] if per_token else value[row : row + 1]
        if per_token and name in ("labels", "shift_labels"):
            prefix[name] = prefix[name].clamp(min=0)
    return prefix


def why_model_separates(model: nn.Module) -> str | None:
    """Return why a model's micro-batches may not share a pass, in half a sentence; None if they may."""
    config = getattr(model, "config", None)
    reasons = {
        "padding is computed": not is_padding_free(model),
        "logits are computed whole": computes_logits(model),
        "the balance of its experts is a loss of each pass": bool(getattr(config, "output_router_logits", False)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class ForwardGroups:
    """Groups of micro-batches of a step that share a forward pass.

    All processes plan alike, by the largest of their micro-batches: a pass of one process waits for those of the others.

    Args:
        host: The Trainer. Its ``why_separate`` may forbid joining.
        budget: Real tokens of a pass; None or 0: a pass for each micro-batch.
    """

    def __init__(self, host: StepHost, budget: int | None) -> None:
        self.host, self.budget = host, budget or 0
        self._joins: bool | None = None  # unknown until there is something to join
        self._waiting: list[Batch] = []
        self._planned: list[int] = []  # micro-batches of each pass that has not run yet

    def restart(self) -> None:
        """Reset the decision to join: another training begins, perhaps with other settings."""
        self._joins, self._waiting, self._planned = None, [], []

    def plan_groups(self, batches: Sequence[Batch]) -> None:
        """Plan the passes of a step from all of its micro-batches."""
        self._waiting, self._planned = [], []
        if not self.budget or len(batches) < 2 or self._joins is False:
            return
        if self._joins is None or computes_logits(self.host.model):
            self._decide(batches)
        if self._joins:
            self._planned = batches_per_pass(self._largest_sizes(batches), self.budget)

    def take(self, batch: Batch) -> list[Batch]:
        """Return the micro-batches that run now, this one the last; none while their pass is incomplete."""
        self._waiting.append(batch)
        if self._planned and len(self._waiting) < self._planned[0]:
            return []
        self._planned = self._planned[1:]
        complete, self._waiting = self._waiting, []
        return complete

    def join(self, batches: Sequence[Batch]) -> Any:
        """Return one batch of several; a single batch is returned unchanged."""
        return batches[0] if len(batches) == 1 else join_batches(batches, self._padding_token()[0])

    def of_an_evaluation(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Yield the batches of an evaluation by pass."""
        joins = self.budget and self.host.why_separate() is None
        return evaluation_passes(batches, self.budget if joins else 0, self._padding_token()[1])

    def _decide(self, batches: Sequence[Batch]) -> None:
        host = self.host
        reason = host.why_separate()
        if reason is None and not self._in_all_processes(all(can_join(b, self._padding_token()[1]) for b in batches)):
            reason = f"a batch of {', '.join(batches[0])} cannot be joined"
        if reason is None and not self._in_all_processes(self._is_mean_over_targets(batches)):
            reason = "the loss of several samples is not the mean of their losses"
        self._joins = reason is None
        if host.accelerator.is_main_process:
            number = host.args.gradient_accumulation_steps
            joined = f"the {number} micro-batches of a step run as one, up to {self.budget:,} tokens"
            info(f"passes     {joined if reason is None else f'each micro-batch is one: {reason}'}")

    def _in_all_processes(self, holds: bool) -> bool:
        """Whether something holds in all processes."""
        return bool(self.host.accelerator.gather(torch.tensor([holds], device=self.host.args.device)).all())

    @torch.no_grad()
    def _is_mean_over_targets(self, batches: Sequence[Batch]) -> bool:
        """Whether the loss of two joined samples is the mean over the targets of both; asked once, of two prefixes."""
        model, args = self.host.running_model, self.host.args
        longest = sorted(batches, key=lambda batch: int(batch["attention_mask"].sum()))[-2:]
        alone = [sample_prefix(batch, length) for batch, length in zip(longest, TEST_LENGTHS, strict=True)]
        counts = [count_targets(batch, shifts_labels(self.host.model)) for batch in alone]
        was_training = model.training
        model.eval()
        try:
            with same_random_state():
                *losses, together = (
                    float(self.host.micro_batch_loss(batch))
                    for batch in (*alone, join_batches(alone, self._padding_token()[0]))
                )
        finally:
            model.train(was_training)
        total = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count)
        mean = total / max(sum(counts), 1)
        half = args.bf16 or args.fp16
        exact = not half and not has_rounded(model) and computing_dtypes(model) <= {torch.float32, torch.float64}
        return abs(together - mean) <= (1e-4 if exact else 2e-2) * (abs(mean) + 0.1)  # bf16 rounds a loss to 0.4 %

    def _largest_sizes(self, batches: Sequence[Batch]) -> list[list[int]]:
        """Return real tokens, rows and columns of each micro-batch, the largest of all processes."""
        accelerator, args = self.host.accelerator, self.host.args
        sizes = torch.zeros(args.gradient_accumulation_steps, 3, dtype=torch.int64)
        sizes[: len(batches)] = torch.tensor(batch_sizes(batches, self.budget, self._padding_token()[1]))
        largest = accelerator.gather(sizes[None].to(args.device)).amax(0)
        return largest[: len(batches)].tolist()

    def _padding_token(self) -> tuple[int, bool]:
        return padding_token(self.host.model, self.host.processing_class)
