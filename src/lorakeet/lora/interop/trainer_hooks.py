"""Hooks in transformers and ``peft``, at the few places that ask nothing before they act.

- ``Trainer._load_from_checkpoint`` and ``_load_best_model``: without ``peft`` they look for a whole model, and with it they
  put the tensors of ``default`` into whichever adapter is active. Here each adapter is restored from its own folder.
- ``get_peft_model`` and ``inject_adapter_in_model`` of ``peft``, which TRL and transformers call with a configuration: one
  of Lorakeet's makes a model of Lorakeet.
- ``model.add_adapter`` of transformers, which asks whether ``peft`` is installed.

Each is set once, when the module is loaded, does nothing to other models and configurations, and is never taken back.
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorakeet.errors import AdapterError
from lorakeet.log import info, warn

#: Files of a checkpoint that a resumed run needs beside the weights -> the state that they hold.
_PARTS = {
    "optimizer[._][pb0-9]*": "optimizer",  # .pt, .bin or a folder of FSDP; Lorakeet's own is not read by transformers
    "scheduler.pt": "learning rate schedule",
    "trainer_state.json": "number of steps",
}
_hooked: set[str] = set()


def missing_parts(folder: str | Path, args: Any) -> list[str]:
    """List the states that a resumed run would begin afresh, since the checkpoint has no file of them.

    Args:
        folder: The checkpoint.
        args: TrainingArguments of the run.
    """
    ranks = [f"rng_state_{rank}.pth" for rank in range(args.world_size)] if args.world_size > 1 else ["rng_state.pth"]
    parts = {**_PARTS, **({"scaler.pt": "loss scale"} if args.fp16 else {}), **dict.fromkeys(ranks, "random state")}
    has_engine = any(Path(folder).glob("global_step*"))  # DeepSpeed keeps optimizer and scaler there
    held = {"optimizer", "loss scale"} if has_engine else set()
    missing = [state for file, state in parts.items() if state not in held and not any(Path(folder).glob(file))]
    return list(dict.fromkeys(missing))


def hook_trainer() -> None:
    """Let transformers' Trainer and ``add_adapter`` know Lorakeet's models, as soon as they are loaded."""
    if "trainer" not in _hooked and hasattr(module := sys.modules.get("transformers.trainer"), "Trainer"):
        _hooked.add("trainer")
        trainer: Any = module.Trainer  # type: ignore[union-attr]
        trainer._load_from_checkpoint = _load_from_checkpoint(trainer._load_from_checkpoint)
        trainer._load_best_model = _load_best_model(trainer._load_best_model)
    module = sys.modules.get("transformers.integrations.peft")
    if "adapters" not in _hooked and hasattr(module, "PeftAdapterMixin"):
        _hooked.add("adapters")
        mixin: Any = module.PeftAdapterMixin  # type: ignore[union-attr]
        mixin.add_adapter = _add_adapter(mixin.add_adapter)


def hook_peft() -> bool:
    """Let ``peft``'s functions make Lorakeet's models from Lorakeet's configurations; whether they do."""
    if "peft" in _hooked:
        return True
    functions, mapping = sys.modules.get("peft.mapping_func"), sys.modules.get("peft.mapping")
    if not hasattr(functions, "get_peft_model") or not hasattr(mapping, "inject_adapter_in_model"):
        return False  # not imported to the end
    models, tuners = functions.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING  # type: ignore
    functions.PeftModel = _model_of(functions.PeftModel)  # type: ignore[union-attr]
    functions.MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {task: _model_of(made) for task, made in models.items()}  # type: ignore
    mapping.PEFT_TYPE_TO_TUNER_MAPPING = {**tuners, "LORA": _tuner_of(tuners["LORA"])}  # type: ignore[union-attr]
    _hooked.add("peft")
    return True


def _is_ours(value: Any, name: str) -> bool:
    """Whether ``value`` is an instance of the public class ``name`` of Lorakeet."""
    return isinstance(value, getattr(importlib.import_module("lorakeet"), name))


def _inside(model: Any) -> Any:
    """Return the model inside ``torch.compile``."""
    return _inside(model._orig_mod) if hasattr(model, "_orig_mod") else model


def _load_from_checkpoint(original: Any) -> Any:
    @functools.wraps(original)
    def load(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        adapted = _inside(self.model if model is None else model)
        if not _is_ours(adapted, "PeftModel") or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            original(self, resume_from_checkpoint, model)
            return
        adapted.restore_adapters(resume_from_checkpoint)
        if missing := missing_parts(resume_from_checkpoint, self.args):
            warn(f"checkpoint {resume_from_checkpoint} does not hold {', '.join(missing)}: these begin afresh")

    return load


def _load_best_model(original: Any) -> Any:
    @functools.wraps(original)
    def load(self: Any) -> None:
        adapted = _inside(self.model)
        if not _is_ours(adapted, "PeftModel") or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            original(self)
            return
        info(f"loading the best adapter, from {self.state.best_model_checkpoint}")
        adapted.restore_adapters(self.state.best_model_checkpoint)

    return load


def _adapted(model: Any, config: Any, adapter: str, **settings: Any) -> Any:
    """Return the model with a new, active adapter."""
    if _is_ours(model, "PeftModel"):
        model.add_adapter(adapter, config)
        model.set_adapter(adapter)
        return model
    return importlib.import_module("lorakeet").get_peft_model(model, config, adapter, **settings)


def _add_adapter(original: Any) -> Any:
    @functools.wraps(original)
    def add_adapter(self: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
        if _is_ours(adapter_config, "PeftConfig"):
            _refuse_other_adapters(self)
            _adapted(self, adapter_config, adapter_name or "default")
        else:
            original(self, adapter_config, adapter_name)

    return add_adapter


def _refuse_other_adapters(model: Any) -> None:
    if getattr(model, "_hf_peft_config_loaded", False) and not _is_ours(model, "PeftModel"):
        raise AdapterError(
            "this model has adapters of peft already", "delete them first, or use peft's configuration here too"
        )


def _model_of(original: Any) -> Any:
    """Return the constructor that ``peft.get_peft_model`` calls."""

    @functools.wraps(original, updated=())
    def make(model: Any, peft_config: Any, adapter_name: str = "default", **settings: Any) -> Any:
        if not _is_ours(peft_config, "PeftConfig"):
            return original(model, peft_config, adapter_name=adapter_name, **settings)
        lorakeet = importlib.import_module("lorakeet")
        return lorakeet.get_peft_model(model, peft_config, adapter_name, settings.get("autocast_adapter_dtype", True))

    return make


def _tuner_of(original: Any) -> Any:
    """Return the tuner class that ``peft.inject_adapter_in_model`` makes, of which it returns ``model``."""

    def make(cls: type, model: Any, config: Any, adapter_name: str, **settings: Any) -> Any:
        if not _is_ours(config, "PeftConfig"):
            return super(tuner, cls).__new__(cls)
        return SimpleNamespace(model=_adapted(model, config, adapter_name))

    tuner: Any = type(original.__name__, (original,), {"__new__": make, "__module__": original.__module__})
    return tuner
