"""The micro-batches of one optimizer step joined into fewer, longer passes.

Where no padding is computed, a pass costs by its real tokens, and short ones cost more than their share: four passes of
200 tokens take longer than one of 800. A step still learns from the same samples, and its loss is the mean over all of its
targets however they fall into passes, so its gradient stays what it was. Memory grows with the tokens of a pass: a budget
bounds them, and a single micro-batch above it runs alone.

The loop of ``transformers.Trainer`` fetches all micro-batches of a step and then hands them over one by one. So the passes
are planned when they are fetched; one that is held back has the loss 0, and the pass that it ends up in has it all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor

from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.log import info
from lorakeet.patches.causal_loss import count_targets
from lorakeet.patches.fused_loss import computes_logits
from lorakeet.patches.padding_free import is_padding_free
from lorakeet.rng import same_random_state

if TYPE_CHECKING:
    from lorakeet.train.trainer import Trainer

Batch = Mapping[str, Any]

#: Columns that may be joined, and what fills up those that have a value for each token; None: the padding token.
FILLINGS: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "labels": IGNORE_INDEX,
    "shift_labels": IGNORE_INDEX,
    "token_type_ids": 0,
    "position_ids": 0,
}
#: Padded positions of a pass for each real token of the budget: embeddings and the last hidden states hold them all.
CELLS = 4
#: Tokens of the two beginnings that show whether a loss adds up.
BEGINNINGS = (16, 7)


def can_be_joined(batch: Batch, has_padding_token: bool = True) -> bool:
    """Whether a batch has the columns of :data:`FILLINGS` alone, with an attention mask, a row for each sample.

    Without a padding token a sequence classifier takes no rows of different lengths.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not (torch.is_tensor(ids) and torch.is_tensor(mask)) or ids.ndim != 2 or mask.shape != ids.shape:
        return False
    for name, value in batch.items():
        if name not in FILLINGS or not torch.is_tensor(value) or value.ndim not in (1, 2) or len(value) != len(ids):
            return False
    labels = batch.get("labels")
    return has_padding_token or labels is None or _has_value_per_token(labels, ids)


def joined(batches: Sequence[Batch], pad_token_id: int) -> dict[str, Tensor]:
    """The samples of several batches in one, padded on the right to the longest.

    Whatever padding a batch has already stays where it is, so positions are what they were.

    Args:
        batches: of the same columns, each as :func:`can_be_joined` wants it.
        pad_token_id: for ``input_ids``.
    """
    columns = max(batch["input_ids"].shape[1] for batch in batches)
    made = {}
    for name, filling in FILLINGS.items():
        if name not in batches[0]:
            continue
        values = [batch[name] for batch in batches]
        if all(_has_value_per_token(batch[name], batch["input_ids"]) for batch in batches):
            wanted = pad_token_id if filling is None else filling
            values = [F.pad(value, (0, columns - value.shape[1]), value=wanted) for value in values]
        made[name] = torch.cat(values)
    return made


def _has_value_per_token(value: Tensor, ids: Tensor) -> bool:
    """Several labels of a sample have a row as well, but these are fractions."""
    return value.shape == ids.shape and not value.is_floating_point()


def share_out(sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """How many neighbouring micro-batches share each pass: as many as the budget holds, and at least one.

    Args:
        sizes: Real tokens, rows and columns of each micro-batch.
        budget: Real tokens of a pass; its padded positions are at most :data:`CELLS` times as many.
    """
    counts: list[int] = []
    tokens = rows = columns = 0
    for more, new_rows, new_columns in sizes:
        both = tokens + more, rows + new_rows, max(columns, new_columns)
        if counts and both[0] <= budget and both[1] * both[2] <= CELLS * budget:
            counts[-1] += 1
            tokens, rows, columns = both
        else:
            counts.append(1)
            tokens, rows, columns = more, new_rows, new_columns
    return counts


def beginning(batch: Batch, length: int) -> dict[str, Tensor]:
    """The first real tokens of a batch's longest sample, all of them targets where targets are tokens."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    row = int(mask.sum(1).argmax())
    places = mask[row].nonzero()[:length, 0]
    little = {}
    for name, value in batch.items():
        per_token = _has_value_per_token(value, ids)
        little[name] = value[row : row + 1, places] if per_token else value[row : row + 1]
        if per_token and name in ("labels", "shift_labels"):
            little[name] = little[name].clamp(min=0)
    return little


def why_separate(trainer: Trainer) -> str | None:
    """Why the micro-batches of a step may not share a pass, in half a sentence; None if they may."""
    args, accelerator = trainer.args, trainer.accelerator
    config = getattr(trainer.model, "config", None)
    reasons = {
        "the loss is not the model's own": not trainer._models_own_loss,
        "the noise of NEFTune depends on the longest sample of a pass": args.neftune_noise_alpha is not None,
        "DeepSpeed counts them": accelerator.distributed_type == DistributedType.DEEPSPEED,
        "processes share a sample": getattr(accelerator, "parallelism_config", None) is not None,
        "padding is computed": not is_padding_free(trainer.model),
        "logits are computed whole": computes_logits(trainer.model),
        "the balance of its experts is a loss of each pass": bool(getattr(config, "output_router_logits", False)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class Passes:
    """Which micro-batches of the step at hand share a pass.

    All processes plan alike, by the largest of their micro-batches: each pass of one would wait for those of the others.

    Args:
        trainer: Whose loop it is. Its ``why_separate`` may forbid joining.
        budget: Real tokens of a pass; None or 0: a pass for each micro-batch.
    """

    def __init__(self, trainer: Trainer, budget: int | None) -> None:
        self.trainer, self.budget = trainer, budget or 0
        self._joins: bool | None = None  # unknown until there is something to join
        self._held: list[Batch] = []
        self._ahead: list[int] = []  # micro-batches of each pass that is still to run

    def restart(self) -> None:
        """Another training begins, maybe under other circumstances."""
        self._joins, self._held, self._ahead = None, [], []

    def plan_groups(self, batches: Sequence[Batch]) -> None:
        """Takes note of all micro-batches of a step, before the first of them is handed over."""
        self._held, self._ahead = [], []
        if not self.budget or len(batches) < 2 or self._joins is False:
            return
        if self._joins is None or computes_logits(self.trainer.model):
            self._decide(batches)
        if self._joins:
            self._ahead = share_out(self._sizes(batches), self.budget)

    def take(self, batch: Batch) -> list[Batch]:
        """The micro-batches that run now, this one the last of them; none while their pass is not complete."""
        self._held.append(batch)
        if self._ahead and len(self._held) < self._ahead[0]:
            return []
        self._ahead = self._ahead[1:]
        whole, self._held = self._held, []
        return whole

    def join(self, batches: Sequence[Batch]) -> Any:
        """One batch of several; a single one is left as it is."""
        return batches[0] if len(batches) == 1 else joined(batches, self._padding_token()[0])

    def of_an_evaluation(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """The batches of an evaluation whose rows have losses of their own, neighbours that share a pass together.

        Several processes, which would have to agree, have a pass for each batch.
        """
        joins = self.budget and self.trainer.accelerator.num_processes == 1 and self.trainer.why_separate() is None
        together: list[Batch] = []
        for batch in batches:
            some = [*together, batch]
            if together and not (joins and len(share_out(self._own_sizes(some), self.budget)) == 1):
                yield together
                some = [batch]
            together = some
        if together:
            yield together

    def _decide(self, batches: Sequence[Batch]) -> None:
        reason = self.trainer.why_separate()
        if reason is None and not self._everywhere(all(map(self._fits, batches))):
            reason = f"a batch of {', '.join(batches[0])} cannot be joined"
        if reason is None and not self._everywhere(self._adds_up(batches)):
            reason = "the loss of several samples is not the mean of their losses"
        self._joins = reason is None
        if self.trainer.is_world_process_zero():
            number = self.trainer.args.gradient_accumulation_steps
            many = f"the {number} micro-batches of a step run as one, up to {self.budget:,} tokens"
            info(f"passes     {many if reason is None else f'each micro-batch is one: {reason}'}")

    def _everywhere(self, holds: bool) -> bool:
        """Whether something holds in all processes."""
        return bool(self.trainer.accelerator.gather(torch.tensor([holds], device=self.trainer.args.device)).all())

    def _fits(self, batch: Batch) -> bool:
        return can_be_joined(batch, self._padding_token()[1])

    @torch.no_grad()
    def _adds_up(self, batches: Sequence[Batch]) -> bool:
        """Whether the loss of two samples together is the mean over the targets of both: asked once, of two beginnings."""
        trainer = self.trainer
        model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model
        longest = sorted(batches, key=lambda batch: int(batch["attention_mask"].sum()))[-2:]
        apart = [beginning(batch, length) for batch, length in zip(longest, BEGINNINGS, strict=True)]
        counts = [count_targets(batch, trainer._shifts_labels) for batch in apart]
        was_training = model.training
        model.eval()
        try:
            with same_random_state(), trainer.accelerator.autocast():
                losses = [
                    float(trainer.compute_loss(model, trainer._prepare_inputs(batch)))
                    for batch in (*apart, joined(apart, self._padding_token()[0]))
                ]
        finally:
            model.train(was_training)
        total = sum(loss * count for loss, count in zip(losses, counts, strict=False) if count)
        mean = total / max(sum(counts), 1)
        half = trainer.args.bf16 or trainer.args.fp16
        exact = not half and all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
        return abs(losses[2] - mean) <= (1e-4 if exact else 2e-2) * (abs(mean) + 0.1)  # bf16 rounds a loss to 0.4 %

    def _sizes(self, batches: Sequence[Batch]) -> list[list[int]]:
        """Real tokens, rows and columns of each micro-batch, the largest of all processes."""
        sizes = torch.zeros(self.trainer.args.gradient_accumulation_steps, 3, dtype=torch.int64)
        sizes[: len(batches)] = torch.tensor(self._own_sizes(batches))
        everywhere = self.trainer.accelerator.gather(sizes[None].to(self.trainer.args.device)).amax(0)
        return everywhere[: len(batches)].tolist()

    def _own_sizes(self, batches: Sequence[Batch]) -> list[tuple[int, int, int]]:
        """Real tokens, rows and columns of each batch; of one that cannot be joined more tokens than any pass may have."""
        sizes = []
        for batch in batches:
            alike = self._fits(batch) and set(batch) == set(batches[0])
            tokens = int(batch["attention_mask"].sum()) if alike else self.budget + 1
            sizes.append((tokens, *(batch["input_ids"].shape if alike else (1, 1))))
        return sizes

    def _padding_token(self) -> tuple[int, bool]:
        """What fills up token ids, and whether the model itself names it."""
        named = getattr(getattr(self.trainer.model, "config", None), "pad_token_id", None)
        other = getattr(self.trainer.processing_class, "pad_token_id", None)
        return (other or 0, False) if named is None else (int(named), True)
