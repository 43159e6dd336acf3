"""The verbs of the command line as functions: open a model with adapters, evaluate, generate, merge, quantize, plan.

Each takes settings and gives back plain values; nothing here prints to stdout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.adapter.serialization import read_notes, read_tensors
from lorakeet.base.architectures import AUTO_CLASSES, PLAIN, check_task, family, own_class
from lorakeet.base.load import Base, inspect_model, load_base
from lorakeet.base.meta_device import meta_model, read_config
from lorakeet.base.quiet import quiet
from lorakeet.chat_template import render_chat
from lorakeet.config import DEFAULT_MODEL, BaseSettings, DataSettings, LoraSettings, TaskName, TaskSettings
from lorakeet.data.collate import make_collator
from lorakeet.data.prepare import prepare
from lorakeet.errors import AdapterError, BaseModelError, DataError, OutputError
from lorakeet.files import write_folder, write_json
from lorakeet.inference.generate import complete
from lorakeet.inference.predict import predict as read
from lorakeet.log import info
from lorakeet.lora.config import LoraConfig, PeftConfig, find_adapter_file
from lorakeet.lora.inject import plan
from lorakeet.lora.model import LoraModel, completed
from lorakeet.quant.int8 import rounded_bytes
from lorakeet.tasks.task import Task
from lorakeet.train.evaluate import evaluate
from lorakeet.train.microbatch_packing import default_token_budget


@dataclass(frozen=True)
class LoadedModel:
    """A base model with adapters on it, by the name each was asked for."""

    base: Base
    adapters: dict[str, str]  # as asked for -> name in the model
    task: Task = field(default_factory=Task)

    @property
    def model(self) -> Any:
        return self.base.model

    def answering(self, adapter: str | None) -> Any:
        """A context in which this adapter answers; None: the bare base."""
        if adapter is not None:
            self.model.set_adapter(self.adapters[adapter], inference_mode=True)
            return nullcontext()
        return self.model.disable_adapter() if isinstance(self.model, LoraModel) else nullcontext()


def open_model(
    settings: BaseSettings, adapters: Sequence[str] = (), *, allow_other_base: bool = False, task: Task | None = None
) -> LoadedModel:
    """Load the base with the head of its task, put every adapter on it, and use the tokenizer saved with the first, if any.

    Args:
        settings: The base. Where it is the default and an adapter names its own base, that one is loaded.
        adapters: Folders or hub ids.
        allow_other_base: Go on although an adapter was trained on another base.
        task: What the model is to do; left out: what the adapters were trained for, or else to write on.

    Raises:
        AdapterError: the adapters were trained for different tasks or labels.
    """
    configs = [PeftConfig.from_pretrained(adapter) for adapter in adapters]
    if configs and settings.model == DEFAULT_MODEL and (named := configs[0].base_model_name_or_path):
        settings = settings.model_copy(update={"model": named})
    tasks = {adapter: adapter_task(adapter, config) for adapter, config in zip(adapters, configs, strict=True)}
    if len(set(tasks.values())) > 1:
        told = "; ".join(f"{adapter}: {task.name} {', '.join(task.labels or ())}" for adapter, task in tasks.items())
        raise AdapterError(f"the adapters were trained for different tasks ({told})", "open one of them at a time")
    task = task or next(iter(tasks.values()), Task())
    base = load_base(settings, auto_class=AUTO_CLASSES[task.name], model_options=task.model_options())
    info(base.describe())
    names: dict[str, str] = {}
    for number, adapter in enumerate(dict.fromkeys(map(str, adapters))):
        names[adapter] = f"adapter{number}"
        PeftModel.from_pretrained(base.model, adapter, names[adapter], allow_other_base=allow_other_base)
    return LoadedModel(_with_tokenizer(base, adapters), names, task)


def adapter_task(adapter: str, config: PeftConfig) -> Task:
    """What an adapter was trained for: as its notes say, or as far as another tool's files tell."""
    if told := read_notes(adapter).get("task"):
        return Task.from_notes(told)
    name: Any = str(config.task_type or "CAUSAL_LM")
    if name not in ("SEQ_CLS", "TOKEN_CLS"):
        return Task(name)
    heads = [t.shape[0] for key, t in read_tensors(adapter).items() if "lora_" not in key and key.endswith("weight")]
    count = min(heads, default=2)  # a head's last layer is its narrowest
    return Task(name, None, tuple(f"LABEL_{number}" for number in range(count)))


def _with_tokenizer(base: Base, adapters: Sequence[str]) -> Base:
    """The base with the tokenizer saved beside the first adapter: it may hold a template or tokens of its own."""
    if not adapters or find_adapter_file(adapters[0], "tokenizer_config.json") is None:
        return base
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapters[0])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(base.model, tokenizer, base.name, base.dtype, base.device)


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
    """Held-out figures of all rows (or of the held-out part that a run with this seed leaves out).

    Returns:
        ``{"loss", "perplexity", "tokens"}``, loss in nats per token, the end token included; for other tasks than writing on
        the figures of the task, such as ``accuracy``.
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
    """What the model writes after each prompt (see :func:`lorakeet.inference.generate.complete`).

    Args:
        chat: Each prompt is a user's turn, rendered by the model's chat template.
    """
    tokenizer = opened.base.tokenizer
    if chat:
        prompts = [render_chat(tokenizer, [{"role": "user", "content": prompt}], True) for prompt in prompts]
    with opened.answering(adapter):
        return complete(opened.model, tokenizer, list(prompts), **settings)


def predict(
    opened: LoadedModel, adapter: str | None, rows: Sequence[str | Mapping[str, str]], *, batch_size: int = 8
) -> list[dict[str, Any]]:
    """What the model says about each text (see :func:`lorakeet.inference.predict.predict`).

    Raises:
        AdapterError: the model writes and does not judge.
    """
    if opened.task.name in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise AdapterError(f"this model does {opened.task.name}: it writes", "use `lorakeet generate`")
    with opened.answering(adapter):
        return read(opened.model, opened.base.tokenizer, opened.task.name, rows, batch_size=batch_size)


def compare(opened: LoadedModel, adapters: Sequence[str], prompts: Sequence[str], **settings: Any) -> Iterator[dict]:
    """For each adapter in turn (the bare base, if there is none) and each prompt: ``{"adapter", "prompt", "text"}``."""
    for adapter in adapters or [None]:  # type: ignore[list-item]
        texts = generate(opened, adapter, prompts, **settings)
        for prompt, text in zip(prompts, texts, strict=True):
            yield {"adapter": adapter, "prompt": prompt, "text": text}


def merge(
    settings: BaseSettings, adapter: str, out: str | Path, *, overwrite: bool = False, allow_other_base: bool = False
) -> dict[str, Any]:
    """Merge an adapter into its base, check the result, and write a plain model that any tool loads.

    Returns:
        ``{"path", "layers", "error", "effect", "scale"}``, see :class:`lorakeet.lora.merge.MergeReport`.

    Raises:
        OutputError: the folder holds something already, or cannot be written to; nothing is left half-written.
    """
    folder = Path(out)
    check_empty(folder, overwrite)
    with write_folder(folder) as aside:  # before the expensive part: can we write there at all?
        opened = open_model(settings, [adapter], allow_other_base=allow_other_base)
        report = opened.model.merge_adapter()
        merged = opened.model.merge_and_unload()
        with quiet():
            merged.save_pretrained(aside)
        opened.base.tokenizer.save_pretrained(aside)
        figures = {"layers": report.layers, "error": report.error, "effect": report.effect, "scale": report.scale}
        write_json(aside / "lorakeet.json", {"merged": {"base": opened.base.name, "adapter": str(adapter), **figures}})
    return {"path": str(folder), **figures}


def quantize(settings: BaseSettings, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Round a base to 8 bits once and write it: such a folder opens in seconds and is read from disk as it is needed.

    Returns:
        ``{"path", "base", "layers", "bytes", "full_bytes"}``: layers in 8 bits, bytes of all weights now and before.

    Raises:
        BaseModelError: the base is quantised already, incomplete, or has weights that are not finite.
        OutputError: the folder holds something already, or cannot be written to; nothing is left half-written.
    """
    folder = Path(out)
    check_empty(folder, overwrite)
    config = inspect_model(settings).config
    if method := getattr(config, "quantization_config", None):
        name = method.get("quant_method", "") if isinstance(method, dict) else ""
        raise BaseModelError(f"{settings.model} is quantised already ({name})", "give the full-precision model")
    with write_folder(folder) as aside:  # before the expensive part: can we write there at all?
        base = load_base(settings.model_copy(update={"bits": 8}), auto_class=own_class(config))
        if base.fresh:
            raise BaseModelError(f"weights are missing and would be random: {', '.join(base.fresh[:5])}")
        info(base.describe())
        with quiet():
            base.model.save_pretrained(aside)
        base.tokenizer.save_pretrained(aside)
        sizes = rounded_bytes(base.model, base.dtype)
        write_json(aside / "lorakeet.json", {"quantised": {"base": base.name, **sizes}})
    return {"path": str(folder), "base": base.name, **sizes}


def check_empty(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is to be replaced."""
    if folder.is_file():
        raise OutputError(f"{folder} is a file, expected a folder", "choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder} is not empty", "choose another --out, or --overwrite to replace it")


def plan_layers(model: str, lora: LoraSettings, task: TaskName = "auto") -> dict[str, Any]:
    """Which layers the settings mean on ``model``, and how many parameters train; reads no weights.

    Args:
        task: auto: what the architecture was made for, without a new head.
    """
    config = read_config(model)
    task = PLAIN[family(config)] if task == "auto" else task
    check_task(task, config, model)
    ghost = meta_model(config, auto_class=AUTO_CLASSES[task])
    adapter = LoraConfig(**lora.model_dump(), task_type=Task(task).peft_type)
    targets = plan(ghost, completed(ghost, adapter))
    trainable, total = get_peft_model(ghost, adapter).get_nb_trainable_parameters()
    return {
        "base_model": model,
        "layers": [target.name for target in targets.targets],
        "summary": targets.describe(),
        "trainable_parameters": trainable,
        "all_parameters": total,
    }
