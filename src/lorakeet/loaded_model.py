"""A base model with adapters, loaded with the head and the tokenizer that the adapters were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.adapter.serialization import read_notes, read_tensors
from lorakeet.adapter.vocabulary import fit_to_adapters, weights_brought
from lorakeet.base.architectures import AUTO_CLASSES
from lorakeet.base.load import Base, load_base
from lorakeet.config import DEFAULT_MODEL, BaseSettings
from lorakeet.errors import AdapterError
from lorakeet.log import info
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.model import LoraModel
from lorakeet.tasks.task import Task, Verb
from lorakeet.tasks.taught import Taught


@dataclass(frozen=True)
class LoadedModel:
    """A base model with adapters.

    Attributes:
        base: The base model and its tokenizer.
        adapters: Folder or hub id of an adapter, as the user wrote it -> its name in the model.
        task: The task of the model.
    """

    base: Base
    adapters: dict[str, str]
    task: Task = field(default_factory=Task)

    @property
    def model(self) -> Any:
        """The model, with the adapters on it."""
        return self.base.model

    def taught(self, adapter: str | None) -> Taught:
        """Return the settings that an adapter was taught with; empty for the base alone."""
        return Taught() if adapter is None else Taught.from_notes(read_notes(adapter))

    def answering(self, adapter: str | None) -> Any:
        """Return a context in which this adapter is active; None: in which no adapter is."""
        if adapter is not None:
            self.model.set_adapter(self.adapters[adapter], inference_mode=True)
            return nullcontext()
        return self.model.disable_adapter() if isinstance(self.model, LoraModel) else nullcontext()


def open_model(
    settings: BaseSettings,
    adapters: Sequence[str] = (),
    *,
    allow_other_base: bool = False,
    allow_untrained: bool = False,
    task: Task | None = None,
    seed: int = 42,
    verb: Verb | None = None,
) -> LoadedModel:
    """Load a base with the head of its task, and put every adapter on it.

    The tokenizer is that saved with the first adapter, if any. If it has tokens that the base has no row for, or the adapter
    has more rows, the base's embedding is resized.

    Args:
        settings: Settings of the base. If they name the default model, the base that the first adapter names is loaded.
        adapters: Folders or hub ids.
        allow_other_base: Accept an adapter that was trained on another base.
        allow_untrained: Accept an adapter whose every B is zero, so that it changes nothing.
        task: Task of the model; by default that of the adapters, or else CAUSAL_LM.
        seed: Seed of weights that neither the base nor an adapter has.
        verb: What the model will be asked to do, checked before anything is loaded; None: anything.

    Raises:
        AdapterError: The adapters were trained for different tasks or labels.
        BaseModelError: See :func:`lorakeet.base.load.load_base`.
    """
    configs = [PeftConfig.from_pretrained(adapter) for adapter in adapters]
    settings = settings_of_base(settings, configs[0], adapters[0]) if configs else settings
    tasks = {adapter: adapter_task(adapter, config) for adapter, config in zip(adapters, configs, strict=True)}
    if len(set(tasks.values())) > 1:
        listed = "; ".join(f"{adapter}: {task.name} {', '.join(task.labels or ())}" for adapter, task in tasks.items())
        raise AdapterError(f"the adapters were trained for different tasks ({listed})", "load one of them at a time")
    task = task or next(iter(tasks.values()), Task())
    if verb and adapters:
        check_verb(task, verb)
    brought = weights_brought(adapters[0]) if len(adapters) == 1 else frozenset()
    options: dict[str, Any] = {"model_options": task.model_options(), "seed": seed, "brought": brought}
    base = load_base(settings, auto_class=AUTO_CLASSES[task.name], **options)
    info(base.describe())
    if adapters:
        base = replace(base, tokenizer=fit_to_adapters(base.model, base.tokenizer, adapters, seed=seed))
    names: dict[str, str] = {}
    for number, adapter in enumerate(dict.fromkeys(map(str, adapters))):
        names[adapter] = f"adapter{number}"
        accepted: dict[str, Any] = {"allow_other_base": allow_other_base, "allow_untrained": allow_untrained}
        PeftModel.from_pretrained(base.model, adapter, names[adapter], **accepted)
    return LoadedModel(base, names, task)


def settings_of_base(settings: BaseSettings, config: PeftConfig, adapter: str) -> BaseSettings:
    """Return the settings with the base that an adapter names, if they name the default model.

    Raises:
        AdapterError: The adapter names a path.
    """
    if settings.model != DEFAULT_MODEL or not (named := config.named_base(adapter)):
        return settings
    return settings.model_copy(update={"model": named})


def check_verb(task: Task, verb: Verb) -> None:
    """Check that a model of this task answers to a verb.

    Raises:
        AdapterError: It does not; the hint names the verb that it answers to.
    """
    if task.verb != verb:
        needs = "a language model" if verb == "generate" else "a classifier, tagger or encoder"
        raise AdapterError(f"this is a {task.name} model; `{verb}` needs {needs}", f"use `lorakeet {task.verb}`")


def adapter_task(adapter: str, config: PeftConfig) -> Task:
    """Return the task of an adapter: from its notes, or else derived from its config and weights.

    Args:
        adapter: Folder or hub id.
        config: The adapter's configuration.
    """
    if noted := read_notes(adapter).get("task"):
        return Task.from_notes(noted)
    name: Any = str(config.task_type or "CAUSAL_LM")
    if name not in ("SEQ_CLS", "TOKEN_CLS"):
        return Task(name)
    heads = [
        len(t) for key, t in read_tensors(adapter).items() if "lora_" not in key and key.endswith("weight") and t.ndim
    ]
    count = min(heads, default=2)  # the last layer of a head is its narrowest
    return Task(name, None, tuple(f"LABEL_{number}" for number in range(count)))
