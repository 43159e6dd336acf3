"""The Trainer for every task but writing on: losses of pairs, and a held-out measurement with the task's own figures."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PrinterCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.patches.causal_loss import count_targets
from lorakeet.rng import same_random_state
from lorakeet.tasks.metrics import compute_metrics_for, loss_and_perplexity
from lorakeet.tasks.task import Task, embed_pairs, pair_loss, span_logits, span_loss
from lorakeet.train.progress_callback import TIMES
from lorakeet.train.trainer import Trainer

#: Held-out texts that are really written by a sequence-to-sequence model when it is measured; all count for the loss.
WRITTEN = 100
#: Tasks whose loss is made here: the model has none, or one that also counts the padding.
OWN_LOSS = ("FEATURE_EXTRACTION", "QUESTION_ANS")
#: Tasks whose loss is a mean over tokens, so that a perplexity makes sense.
PER_TOKEN = ("SEQ_2_SEQ_LM", "MASKED_LM")


class TaskTrainer(Trainer):
    """As :class:`lorakeet.train.trainer.Trainer`.

    Args:
        task: What is learned; its labels name the figures.
    """

    def __init__(self, *rest: Any, task: Task, **settings: Any) -> None:
        super().__init__(*rest, **settings)
        self.task = task
        self.predictions: EvalPrediction | None = None  # of the last measurement, for pictures
        if task.name in OWN_LOSS:
            self.model_accepts_loss_kwargs, self._counts_known = False, True

    # ---- loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; for pairs the loss of finding the right partner in the micro-batch."""
        if self.task.name not in OWN_LOSS:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self._own_loss(model, inputs)
        if num_items_in_batch is not None and model.training:
            loss = loss * self.share(count_targets(inputs, shifted=False), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _own_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        if self.task.name == "FEATURE_EXTRACTION":
            vectors = embed_pairs(model, batch)
            return pair_loss(*vectors), {"embeddings": vectors}
        outputs = model(**{name: value for name, value in batch.items() if not name.endswith("_positions")})
        return span_loss(outputs, batch), outputs

    def why_separate(self) -> str | None:
        """Pairs are told from one another: with other company in a pass they have another loss."""
        if self.task.name == "FEATURE_EXTRACTION":
            return "each pair is told from the others of its micro-batch"
        return super().why_separate()

    # ---- measurement ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss per target over all of them, and the task's figures."""
        with same_random_state():
            torch.manual_seed(self.args.seed)  # the same tokens are masked in every measurement
            self.model.eval()
            self.callback_handler.eval_dataloader = dataloader
            total, targets, written = 0.0, 0, 0
            kept: list[Any] = []
            for inputs in dataloader:
                batch = self._prepare_inputs(inputs)
                write = self.task.name == "SEQ_2_SEQ_LM" and written < WRITTEN
                loss, count, rows = self._measure(batch, write)
                total, targets, written = total + loss * count, targets + count, written + len(rows)
                kept += self.accelerator.gather_for_metrics(rows, use_gather_object=True)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            sums = self.accelerator.gather(torch.tensor([[total, targets]], device=self.args.device)).sum(0)
            figures = self._figures(float(sums[0]), int(sums[1]), kept)
        named = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=len(kept))

    def _measure(self, batch: dict[str, Any], write: bool) -> tuple[float, int, list[tuple[Any, Any]]]:
        """Mean loss and targets of a batch, and of each row what was predicted and what was right."""
        with self.accelerator.autocast():
            if self.task.name in OWN_LOSS:
                loss, outputs = self._own_loss(self.model, batch)
            else:
                outputs = self.model(**batch)
                loss = outputs.loss
            rows = self._written(batch) if write else self._predicted(outputs, batch)
        count = count_targets(batch, shifted=False)
        return (float(loss) if count else 0.0), count, rows

    def _predicted(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
        if self.task.name == "FEATURE_EXTRACTION":
            return list(zip(*map(_rows, outputs["embeddings"][:2]), strict=True))
        if self.task.name == "SEQ_CLS":
            return list(zip(_rows(outputs.logits.float()), _rows(batch["labels"]), strict=True))
        if self.task.name in ("TOKEN_CLS", "MASKED_LM"):
            best, labels = outputs.logits.argmax(-1), batch["labels"]
            real = labels.ne(IGNORE_INDEX)
            return [(b[r].cpu().numpy(), y[r].cpu().numpy()) for b, y, r in zip(best, labels, real, strict=True)]
        if self.task.name == "QUESTION_ANS":
            spans = torch.stack([logits.argmax(-1) for logits in span_logits(outputs, batch)], dim=1)
            right = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
            return [
                (self._answer(ids, guess), self._answer(ids, answer))
                for ids, guess, answer in zip(batch["input_ids"], spans, right, strict=True)
            ]
        return []

    def _answer(self, ids: Tensor, span: Tensor) -> str:
        """The text between two positions; none where both point at the first token, as for "no answer"."""
        start, end = span.tolist()
        return "" if end == 0 else self._decode(ids[start : end + 1])

    def _written(self, batch: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        """What the model writes from each source, greedily, beside the target."""
        labels = batch["labels"]
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        texts = self.model.generate(**given, max_new_tokens=labels.shape[1] + 8, do_sample=False, num_beams=1)
        right = (row[row.ne(IGNORE_INDEX)] for row in labels)
        return [(self._decode(text), self._decode(target)) for text, target in zip(texts, right, strict=True)]

    def _decode(self, ids: Tensor) -> str:
        decode: Any = self.processing_class.decode  # type: ignore[union-attr]
        return decode(ids, skip_special_tokens=True).strip()

    def _figures(self, total: float, targets: int, kept: list[tuple[Any, Any]]) -> dict[str, Any]:
        figures: dict[str, Any] = loss_and_perplexity(total, targets)
        figures["targets"] = figures.pop("tokens")
        if self.task.name not in PER_TOKEN:
            figures.pop("perplexity")
        if kept:
            predicted, right = (_stacked(list(part)) for part in zip(*kept, strict=True))
            self.predictions = EvalPrediction(predictions=predicted, label_ids=right)
            figures |= compute_metrics_for(self.task.name, self.task.problem, self.task.labels)(self.predictions)
        return figures

    @torch.no_grad()
    def _rehearse_evaluation(self, dataset: Any) -> None:
        if not isinstance(dataset, datasets.Dataset) or "length" not in dataset.column_names:
            return
        lengths = dataset["length"][:]
        longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-self.args.eval_batch_size :]
        self.model.eval()
        self._measure(self._prepare_inputs(self.data_collator([dataset[i] for i in longest])), write=False)


def _rows(values: Tensor) -> list[Any]:
    return list(values.detach().cpu().numpy())


def _stacked(rows: list[Any]) -> Any:
    """One array of all rows; ragged ones are filled up with -100, texts stay a list."""
    if isinstance(rows[0], str):
        return rows
    if rows[0].ndim == 0 or len({row.shape for row in rows}) == 1:
        return np.stack(rows)
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=IGNORE_INDEX) for row in rows])


def measure(
    model: nn.Module, rows: Any, collator: Any, task: Task, tokenizer: Any, *, batch_size: int = 8, seed: int = 42
) -> dict[str, Any]:
    """The task's figures on ``rows``, outside of a training.

    Returns:
        ``{"loss", ...}``, as in a run's ``summary.json``.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_eval_batch_size=batch_size,
            seed=seed,
            remove_unused_columns=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
        )
        trainer = TaskTrainer(
            model, args, task=task, eval_dataset=rows, data_collator=collator, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        figures = trainer.evaluate()
    return {
        name.removeprefix("eval_"): value
        for name, value in figures.items()
        if name.startswith("eval_") and not name.endswith(TIMES)
    }
