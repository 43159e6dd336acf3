"""The commands as functions: load a model with adapters, evaluate, generate, predict, compare, merge, quantize, export, plan.

Each takes settings and returns plain values; nothing here prints to stdout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.base.architectures import AUTO_CLASSES, DEFAULT_TASKS, check_task, family
from lorakeet.base.meta_device import meta_model, read_config
from lorakeet.chat.template import has_system_turn, with_system_turn
from lorakeet.config import (
    QUANTIZED_FORMATS,
    BaseSettings,
    DataSettings,
    LoraSettings,
    RunConfig,
    TaskName,
)
from lorakeet.errors import AdapterError
from lorakeet.export.models import check_empty, merge, quantize
from lorakeet.export.run import export
from lorakeet.inference.generate import Prompt, complete
from lorakeet.inference.predict import predict as predict_rows
from lorakeet.inference.questions import Question
from lorakeet.loaded_model import LoadedModel, check_verb, open_model
from lorakeet.log import info, warn
from lorakeet.lora.config import LoraConfig, PeftConfig
from lorakeet.lora.default_targets import resolve_config
from lorakeet.lora.inject import plan_injection
from lorakeet.plan.fit import Fitted, bytes_of
from lorakeet.plan.plan import Plan
from lorakeet.rank.resize import resize
from lorakeet.tasks.setup import lora_arguments
from lorakeet.tasks.task import Task
from lorakeet.train.planning.planner import Planner, fit_run
from lorakeet.workshop.combine import combine_adapters
from lorakeet.workshop.evaluate import evaluate_data, prepare_samples
from lorakeet.workshop.on_data import BASE, compare_on_rows
from lorakeet.workshop.similarity import similarity_report

#: Share of conversations with a system turn from which on one without is warned of.
_MOST = 0.5

__all__ = [
    "LoadedModel",
    "check_empty",
    "combine_adapters",
    "compare",
    "compare_adapters",
    "evaluate_data",
    "export",
    "fit_training",
    "generate",
    "merge",
    "open_model",
    "plan_layers",
    "plan_training",
    "predict",
    "quantize",
    "resize_adapter",
    "system_turn",
]


def generate(
    opened: LoadedModel,
    adapter: str | None,
    prompts: Sequence[Prompt],
    *,
    chat: bool = False,
    system: str | None = None,
    **settings: Any,
) -> list[str]:
    """Complete prompts; see :func:`lorakeet.inference.generate.complete`.

    Args:
        opened: The model with its adapters.
        adapter: The active adapter; None: the base alone.
        prompts: Texts to complete; or conversations (lists of messages) to continue with an assistant turn.
        chat: Treat each text as a user turn.
        system: System turn of conversations that have none; None: that which the adapter was taught with, if any; empty:
            none.
        **settings: Further arguments of ``complete``, such as ``max_new_tokens`` and ``greedy``.

    Returns:
        The new text of each prompt.

    Raises:
        AdapterError: The model generates no text.
        ConfigError: A setting is out of range.
        DataError: A prompt is empty or too long.
    """
    check_verb(opened.task, "generate")
    if chat:
        prompts = [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in prompts]
    conversations = [one for one in prompts if not isinstance(one, str)]
    if len(conversations) < len(prompts):
        _check_plain(opened, adapter)
    if not all(map(has_system_turn, conversations)):
        turn = system_turn(opened, adapter, system)
        prompts = [one if isinstance(one, str) else with_system_turn(one, turn) for one in prompts]
    with opened.answering(adapter):
        return complete(opened.model, opened.base.tokenizer, prompts, **settings)


def system_turn(opened: LoadedModel, adapter: str | None, given: str | None = None) -> str | None:
    """Return the system turn for conversations with an adapter, and log where it comes from.

    Args:
        opened: The model with its adapters.
        adapter: The active adapter; None: the base alone.
        given: The system turn that is asked for; None: that of the adapter's training; empty: none.
    """
    chat = opened.taught(adapter).chat
    taught = chat.get("system")
    if given is None and taught:
        info(f"system     {taught!r}, as the adapter was taught (--system gives another)")
        return str(taught)
    if given and taught and given != taught:
        warn(f"the adapter was taught with another system turn: {taught!r}")
    elif not given and taught:
        warn(f"no system turn, but the adapter was taught with {taught!r}")
    elif not given and chat.get("share", 0) > _MOST:
        warn("the adapter was taught with system turns of many kinds, and there is none here: give one with --system")
    return given or None


def _check_plain(opened: LoadedModel, adapter: str | None) -> None:
    """Warn where an adapter that was taught on conversations completes plain text."""
    if opened.taught(adapter).chat:
        warn("the adapter was taught on conversations, and the prompt is plain text: --chat makes it a user turn")


def predict(
    opened: LoadedModel,
    adapter: str | None,
    rows: Sequence[Question],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[dict[str, Any]]:
    """Predict the answer of the model's task for each text; see :func:`lorakeet.inference.predict.predict`.

    Args:
        opened: The model with its adapters.
        adapter: The active adapter; None: the base alone.
        rows: Texts; mappings with ``text`` and ``text_pair`` for a classifier of pairs, with ``question`` and ``context``
            for QUESTION_ANS.
        batch_size: Rows per batch.
        max_length: Tokens of the longest sample; None: as in the training of the adapter.

    Returns:
        A dictionary for each row, with keys by task.

    Raises:
        AdapterError: The model generates text.
        DataError: A row is empty, or not of the form that the task needs.
    """
    check_verb(opened.task, "predict")
    taught = opened.taught(adapter)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length or taught.max_length}
    with opened.answering(adapter):
        return predict_rows(opened.model, opened.base.tokenizer, opened.task.name, rows, pairs=taught.pairs, **settings)


def compare(opened: LoadedModel, adapters: Sequence[str], prompts: Sequence[Prompt], **settings: Any) -> Iterator[dict]:
    """Yield ``{"adapter", "prompt", "text"}`` for each prompt of each adapter in turn; without adapters, of the base."""
    for adapter in adapters or [None]:  # type: ignore[list-item]
        texts = generate(opened, adapter, prompts, **settings)
        for prompt, text in zip(prompts, texts, strict=True):
            yield {"adapter": adapter, "prompt": prompt, "text": text}


def plan_layers(model: str, lora: LoraSettings, task: TaskName = "auto") -> dict[str, Any]:
    """List the layers that the settings select, and count the trainable parameters; reads no weights.

    Args:
        model: Hub id, folder or GGUF file, of which only the configuration is read.
        lora: Settings of LoRA.
        task: Task of the model; ``auto`` is the architecture's own task, without a new head.

    Returns:
        ``{"base_model", "layers", "summary", "trainable_parameters", "all_parameters"}``.

    Raises:
        BaseModelError: There is no such model, or it does not support the task.
        TargetError: The settings select no layer.
    """
    config = read_config(model)
    task = DEFAULT_TASKS[family(config)] if task == "auto" else task
    check_task(task, config, model)
    ghost = meta_model(config, auto_class=AUTO_CLASSES[task])
    adapter: PeftConfig = LoraConfig(**lora_arguments(lora, min(QUANTIZED_FORMATS)), task_type=Task(task).peft_type)
    adapter = resolve_config(ghost, adapter)
    targets = plan_injection(ghost, adapter)
    trainable, total = get_peft_model(ghost, adapter).get_nb_trainable_parameters()
    return {
        "base_model": model,
        "layers": [target.name for target in targets.targets],
        "summary": targets.describe(),
        "trainable_parameters": trainable,
        "all_parameters": total,
    }


def resize_adapter(
    adapter: str,
    out: Path,
    base: BaseSettings,
    data: DataSettings | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the nearest adapter of a lower rank, and measure the loss of both if data is given.

    Args:
        adapter: Folder or hub id.
        out: Folder to write.
        base: Settings of the base, which only a measurement needs.
        data: Data to measure on, all rows of it.
        rank: The rank of every layer.
        energy: Instead of ``rank``: the share of the energy that each layer keeps.
        overwrite: Replace the contents of ``out``.

    Returns:
        The result of :func:`lorakeet.rank.resize.resize`; with data also ``loss_before`` and ``loss_after``.

    Raises:
        AdapterError: See :func:`lorakeet.rank.resize.resize`.
        OutputError: ``out`` is not empty or not writable.
    """
    made = resize(adapter, check_empty(out, overwrite), rank=rank, energy=energy)
    if data is not None:
        opened = open_model(base, [adapter, str(out)], allow_untrained=True)
        for name, which in (("loss_before", adapter), ("loss_after", str(out))):
            made[name] = evaluate_data(opened, which, data)["loss"]
    return made


def compare_adapters(
    one: str,
    other: str,
    base: BaseSettings | None = None,
    data: DataSettings | None = None,
    *,
    prompts: Sequence[Prompt] = (),
    allow_other_base: bool = False,
    max_new_tokens: int = 60,
    progress: Callable[[int, int], None] | None = None,
    **samples: Any,
) -> dict[str, Any]:
    """Compare two adapters: their updates, and with data or prompts what they do.

    Args:
        one: Folder or hub id.
        other: The same, of the other adapter.
        base: Settings of the base, which only data and prompts need.
        data: Data to compare on, encoded as the first adapter was taught.
        prompts: Prompts for completions side by side, greedy.
        allow_other_base: Accept adapters of different bases.
        max_new_tokens: Maximum number of new tokens of a completion.
        progress: Function of the rows done and their number.
        **samples: Arguments of :func:`lorakeet.workshop.evaluate.prepare_samples`, such as ``held_out_only``.

    Returns:
        The result of :func:`lorakeet.workshop.similarity.similarity_report`; with data also ``data``, the result of
        :func:`lorakeet.workshop.on_data.compare_on_rows`; with prompts also ``completions``.

    Raises:
        AdapterError: An adapter cannot be read, they are of different bases, or generate no text.
        DataError: The data cannot be read.
    """
    if str(one) == str(other):
        raise AdapterError(f"adapter {str(one)!r} is given twice, expected two adapters", "name another one")
    report = similarity_report(one, other, allow_other_base=allow_other_base)
    if not data and not prompts:
        return report
    opened = open_model(base or BaseSettings(), [one, other], verb="generate", allow_other_base=allow_other_base)
    if data:
        rows = prepare_samples(opened, one, data, **samples)
        report["data"] = compare_on_rows(opened, (one, other), rows, progress)
    if prompts:
        settings: dict[str, Any] = {"greedy": True, "max_new_tokens": max_new_tokens}
        texts = {BASE: generate(opened, None, prompts, **settings)}
        for answer in compare(opened, (one, other), prompts, **settings):
            texts.setdefault(answer["adapter"], []).append(answer["text"])
        report["completions"] = [
            {"prompt": prompt, "texts": {name: own[row] for name, own in texts.items()}}
            for row, prompt in enumerate(prompts)
        ]
    return report


def plan_training(config: RunConfig) -> Plan:
    """Predict memory, time and disk space of a run; reads no weights.

    Args:
        config: Settings of the run; without ``data.path`` samples of ``data.max_length`` tokens are assumed.

    Raises:
        BaseModelError, ConfigError, DataError, TargetError: As a run raises them before its base is loaded.
    """
    return Planner().plan(config)


def fit_training(config: RunConfig, limit: int | str | None = None) -> Fitted:
    """Choose the changes of settings that make a run fit into memory and cost least time.

    Args:
        config: Settings of the run.
        limit: Bytes that the process may have, or a text such as ``2GB``; None: what is free.

    Raises:
        ConfigError: No change makes it fit, or ``limit`` is no size.
    """
    return fit_run(config, bytes_of(limit) if isinstance(limit, str) else limit)
