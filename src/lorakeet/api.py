"""The commands as functions: load a model with adapters, evaluate, generate, predict, compare, merge, quantize, plan.

Each takes settings and returns plain values; nothing here prints to stdout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.base.architectures import AUTO_CLASSES, DEFAULT_TASKS, check_task, family, own_class
from lorakeet.base.load import inspect_model, load_base
from lorakeet.base.meta_device import meta_model, read_config
from lorakeet.base.quiet import quiet
from lorakeet.chat_template import render_chat
from lorakeet.config import BaseSettings, DataSettings, LoraSettings, TaskName, TaskSettings
from lorakeet.data.collate import make_collator
from lorakeet.data.prepare import prepare
from lorakeet.errors import AdapterError, BaseModelError, DataError, OutputError
from lorakeet.files import write_folder, write_json
from lorakeet.inference.generate import complete
from lorakeet.inference.predict import predict as predict_rows
from lorakeet.loaded_model import LoadedModel, open_model
from lorakeet.log import info
from lorakeet.lora.config import LoraConfig
from lorakeet.lora.default_targets import resolve_config
from lorakeet.lora.inject import plan_injection
from lorakeet.quant.protocol import quantized_bytes
from lorakeet.tasks.task import Task
from lorakeet.train.evaluate import evaluate
from lorakeet.train.microbatch_packing import default_token_budget

__all__ = [
    "LoadedModel",
    "compare",
    "evaluate_data",
    "generate",
    "merge",
    "open_model",
    "plan_layers",
    "predict",
    "quantize",
]


def evaluate_data(
    opened: LoadedModel,
    adapter: str | None,
    data: DataSettings,
    *,
    held_out_only: bool = False,
    seed: int = 42,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the loss or the task's metrics on data.

    Args:
        opened: The model with its adapters.
        adapter: The active adapter; None: the base alone.
        data: Settings of the data.
        held_out_only: Use only the rows that a run with this ``seed`` and ``data.eval_fraction`` holds out.
        seed: Seed of the run.
        batch_size: Rows per forward pass.
        progress: Function of the rows done and their number.

    Returns:
        For CAUSAL_LM ``{"loss", "perplexity", "tokens"}``, the loss in nats per target token, end token included; for other
        tasks their metrics, such as ``accuracy``.

    Raises:
        DataError: The data cannot be read, or no rows are held out.
    """
    data = data if held_out_only else data.model_copy(update={"eval_fraction": 0.0})
    tokenizer, task = opened.base.tokenizer, opened.task
    chosen = TaskSettings.model_validate(
        {"type": task.name, "problem": task.problem or "auto", "labels": list(task.labels) if task.labels else None}
    )
    prepared = prepare(data, chosen, tokenizer, seed=seed, max_positions=_window(opened.model))
    rows = prepared.held_out if held_out_only else prepared.train
    if rows is None:
        raise DataError("nothing is held out: eval_fraction is 0", "give --eval-fraction as in the run")
    collator = make_collator(chosen, tokenizer, opened.model)
    with opened.answering(adapter):
        return evaluate(
            opened.model,
            rows,
            collator,
            batch_size,
            task=task,
            tokenizer=tokenizer,
            token_budget=default_token_budget(opened.model, opened.base.device, batch_size * data.max_length),
            seed=seed,
            progress=progress,
        )


def _window(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def generate(
    opened: LoadedModel, adapter: str | None, prompts: Sequence[str], *, chat: bool = False, **settings: Any
) -> list[str]:
    """Complete prompts; see :func:`lorakeet.inference.generate.complete`.

    Args:
        opened: The model with its adapters.
        adapter: The active adapter; None: the base alone.
        prompts: Texts to complete.
        chat: Treat each prompt as a user turn, rendered with the chat template.
        **settings: Further arguments of ``complete``, such as ``max_new_tokens`` and ``greedy``.

    Returns:
        The new text of each prompt.

    Raises:
        ConfigError: A setting is out of range.
        DataError: A prompt is empty or too long.
    """
    tokenizer = opened.base.tokenizer
    if chat:
        prompts = [render_chat(tokenizer, [{"role": "user", "content": prompt}], True) for prompt in prompts]
    with opened.answering(adapter):
        return complete(opened.model, tokenizer, list(prompts), **settings)


def predict(
    opened: LoadedModel, adapter: str | None, rows: Sequence[str | Mapping[str, str]], *, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Predict the answer of the model's task for each text; see :func:`lorakeet.inference.predict.predict`.

    Args:
        opened: The model with its adapters.
        adapter: The active adapter; None: the base alone.
        rows: Texts; for QUESTION_ANS mappings with ``question`` and ``context``.
        batch_size: Rows per batch.

    Returns:
        A dictionary for each row, with keys by task.

    Raises:
        AdapterError: The model generates text.
        DataError: A row is empty, or not of the form that the task needs.
    """
    if opened.task.name in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise AdapterError(
            f"this is a {opened.task.name} model; `predict` needs a classifier, tagger or encoder",
            "use `lorakeet generate`",
        )
    with opened.answering(adapter):
        return predict_rows(opened.model, opened.base.tokenizer, opened.task.name, rows, batch_size=batch_size)


def compare(opened: LoadedModel, adapters: Sequence[str], prompts: Sequence[str], **settings: Any) -> Iterator[dict]:
    """Yield ``{"adapter", "prompt", "text"}`` for each prompt of each adapter in turn; without adapters, of the base."""
    for adapter in adapters or [None]:  # type: ignore[list-item]
        texts = generate(opened, adapter, prompts, **settings)
        for prompt, text in zip(prompts, texts, strict=True):
            yield {"adapter": adapter, "prompt": prompt, "text": text}


def merge(
    settings: BaseSettings,
    adapter: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    allow_other_base: bool = False,
    allow_untrained: bool = False,
) -> dict[str, Any]:
    """Merge an adapter into its base, check the outputs, and save a plain model that any tool loads.

    Args:
        settings: Settings of the base.
        adapter: Folder or hub id.
        out: Folder to write, atomically.
        overwrite: Replace the contents of ``out``.
        allow_other_base: Accept an adapter that was trained on another base.
        allow_untrained: Accept an adapter that changes nothing.

    Returns:
        ``{"path", "layers", "error", "effect", "scale"}``, see :class:`lorakeet.lora.merge.MergeReport`.

    Raises:
        MergeError: Merged and unmerged outputs differ, or a layer cannot be merged.
        OutputError: ``out`` is not empty or not writable.
    """
    folder = check_empty(out, overwrite)
    with write_folder(folder) as aside:  # fails before the expensive part if the folder is not writable
        opened = open_model(settings, [adapter], allow_other_base=allow_other_base, allow_untrained=allow_untrained)
        report = opened.model.merge_adapter()
        merged = opened.model.merge_and_unload()
        with quiet():
            merged.save_pretrained(aside)
        opened.base.tokenizer.save_pretrained(aside)
        figures = {"layers": report.layers, "error": report.error, "effect": report.effect, "scale": report.scale}
        write_json(aside / "lorakeet.json", {"merged": {"base": opened.base.name, "adapter": str(adapter), **figures}})
    return {"path": str(folder), **figures}


def quantize(settings: BaseSettings, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Quantize a base to 8 bits and save it. The folder loads in seconds; its weights are read from disk on demand.

    Args:
        settings: Settings of the base.
        out: Folder to write, atomically.
        overwrite: Replace the contents of ``out``.

    Returns:
        ``{"path", "base", "layers", "bytes", "full_bytes"}``: layers in 8 bits, bytes of all weights after and before.

    Raises:
        BaseModelError: The base is quantized already, incomplete, or has weights that are not finite.
        OutputError: ``out`` is not empty or not writable.
    """
    folder = check_empty(out, overwrite)
    config = inspect_model(settings).config
    if method := getattr(config, "quantization_config", None):
        name = method.get("quant_method", "") if isinstance(method, dict) else ""
        raise BaseModelError(f"{settings.model} is quantized already ({name})", "give the full-precision model")
    with write_folder(folder) as aside:  # fails before the expensive part if the folder is not writable
        base = load_base(settings.model_copy(update={"bits": 8}), auto_class=own_class(config))
        if base.fresh:
            raise BaseModelError(
                f"weights are missing and would be random: {', '.join(base.fresh[:5])}", "download its files again"
            )
        info(base.describe())
        with quiet():
            base.model.save_pretrained(aside)
        base.tokenizer.save_pretrained(aside)
        sizes = quantized_bytes(base.model, base.dtype)
        write_json(aside / "lorakeet.json", {"quantised": {"base": base.name, **sizes}})
    return {"path": str(folder), "base": base.name, **sizes}


def check_empty(out: str | Path, overwrite: bool) -> Path:
    """Check that an output folder is missing or empty, unless it may be replaced; return its path.

    Raises:
        OutputError: It is not empty, or a file, or its name is empty.
    """
    folder = Path(out)
    if not str(out).strip():
        raise OutputError("the output folder has no name, expected a path", "choose another --out")
    if folder.is_file():
        raise OutputError(f"{folder} is a file, expected a folder", "choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder} is not empty", "choose another --out, or --overwrite to replace it")
    return folder


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
    adapter = LoraConfig(**lora.model_dump(), task_type=Task(task).peft_type)
    targets = plan_injection(ghost, resolve_config(ghost, adapter))
    trainable, total = get_peft_model(ghost, adapter).get_nb_trainable_parameters()
    return {
        "base_model": model,
        "layers": [target.name for target in targets.targets],
        "summary": targets.describe(),
        "trainable_parameters": trainable,
        "all_parameters": total,
    }
