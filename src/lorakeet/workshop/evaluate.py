"""Evaluate a model with adapters on data, prepared as an adapter was taught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.collate import make_collator
from lorakeet.data.prepare import prepare
from lorakeet.errors import DataError
from lorakeet.facts.vocabulary import embedding_rows
from lorakeet.facts.window import window
from lorakeet.loaded_model import LoadedModel
from lorakeet.tasks.taught import Taught
from lorakeet.train.evaluate import evaluate
from lorakeet.train.microbatch_packing import default_token_budget


@dataclass(frozen=True)
class Samples:
    """Samples of data, made as an adapter was taught.

    Attributes:
        rows: Tokens and targets.
        answers: The rows that the samples were made of, as tasks number them.
        collator: Makes a batch of samples.
        taught: The settings that the adapter was taught with.
        seed: Seed of the masks.
        batch_size: Samples per batch.
        max_length: Tokens of the longest sample.
    """

    rows: Any
    answers: Any
    collator: Any
    taught: Taught
    seed: int
    batch_size: int
    max_length: int


def prepare_samples(
    opened: LoadedModel,
    adapter: str | None,
    data: DataSettings,
    *,
    held_out_only: bool = False,
    task_settings: TaskSettings | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
) -> Samples:
    """Read and encode data, by default with the settings that an adapter was taught with.

    Args:
        opened: The model with its adapters.
        adapter: The adapter whose settings count; None: none.
        data: See :func:`evaluate_data`, as the arguments that follow.
        held_out_only: Use only the held-out rows of a run.
        task_settings: Settings of the masks.
        seed: Seed of the run.
        batch_size: Rows per forward pass.

    Raises:
        DataError: The data cannot be read, or no rows are held out.
    """
    tokenizer, task = opened.base.tokenizer, opened.task
    taught = opened.taught(adapter)
    data = taught.data_settings(data, held_out_only=held_out_only)
    data = data if held_out_only else data.model_copy(update={"eval_fraction": 0.0})
    seed = taught.train.get("seed", 42) if seed is None else seed
    batch_size = taught.train.get("batch_size", 8) if batch_size is None else batch_size
    own = {"type": task.name, "problem": task.problem or "auto", "labels": list(task.labels) if task.labels else None}
    chosen = taught.task_settings(task_settings or TaskSettings()).model_copy(update=own)
    limits = {"max_positions": window(opened.model.config), "vocabulary": embedding_rows(opened.model)}
    prepared = prepare(data, chosen, tokenizer, seed=seed, **limits)
    rows = prepared.held_out if held_out_only else prepared.train
    if rows is None:
        raise DataError("nothing is held out: eval_fraction is 0", "give --eval-fraction as in the run")
    collator = make_collator(chosen, tokenizer, opened.model)
    return Samples(rows, prepared.rows, collator, taught, seed, batch_size, data.max_length)


def evaluate_data(
    opened: LoadedModel,
    adapter: str | None,
    data: DataSettings,
    *,
    held_out_only: bool = False,
    task_settings: TaskSettings | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the loss or the task's metrics on data, by default with the settings that the adapter was taught with.

    Args:
        opened: The model with its adapters.
        adapter: The active adapter; None: the base alone.
        data: Settings of the data. Those that are not set are taken from the adapter's notes: columns, ``learn``,
            ``max_length`` and so on.
        held_out_only: Use only the rows that a run with this ``seed`` and ``data.eval_fraction`` holds out.
        task_settings: Settings of the masks; those that are not set are taken from the adapter's notes.
        seed: Seed of the run; None: that of the adapter's notes, else 42.
        batch_size: Rows per forward pass; None: that of the adapter's notes, else 8.
        progress: Function of the rows done and their number.

    Returns:
        For CAUSAL_LM ``{"loss", "perplexity", "tokens"}``, the loss in nats per target token, end token included; for other
        tasks their metrics, such as ``accuracy``.

    Raises:
        DataError: The data cannot be read, or no rows are held out.
    """
    chosen: dict[str, Any] = {"held_out_only": held_out_only, "task_settings": task_settings}
    samples = prepare_samples(opened, adapter, data, seed=seed, batch_size=batch_size, **chosen)
    with opened.answering(adapter):
        return evaluate(
            opened.model,
            samples.rows,
            samples.collator,
            samples.batch_size,
            task=opened.task,
            tokenizer=opened.base.tokenizer,
            answers=samples.answers,
            token_budget=_token_budget(opened, samples.taught, samples.batch_size * samples.max_length),
            skip_padding=samples.taught.train.get("padding_free", True),
            seed=samples.seed,
            progress=progress,
        )


def _token_budget(opened: LoadedModel, taught: Taught, micro_batch_tokens: int) -> int:
    """Return the tokens that batches may share a pass of, as in the training."""
    noted = taught.train.get("token_budget")
    return default_token_budget(opened.model, opened.base.device, micro_batch_tokens) if noted is None else noted
