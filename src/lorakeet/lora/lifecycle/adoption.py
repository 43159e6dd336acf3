"""The class of a model with adapters: made at run time, a subclass of our methods and of the model's own former class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakeet.lora.interop.trainer_hooks import hook_trainer
from lorakeet.lora.layer import ActiveAdapters
from lorakeet.lora.peft_names.base_view import lead_to_model

_classes: dict[tuple[type, type], type] = {}


def adopt(model: Any, own: type) -> Any:
    """Give ``model`` the methods of ``own``, in place. It has no adapter yet; a model that has some stays as it is."""
    if isinstance(model, tuple(_classes.values())):
        return model
    hook_trainer()
    lead_to_model(model)
    model.peft_config, model._parts, model._base_biases = {}, [], []
    model.switch = ActiveAdapters()
    model.__class__ = _subclass(own, type(model))
    return model


def abandon(model: Any) -> None:
    """Give ``model`` its former class back: the inverse of :func:`adopt`."""
    for module in model.modules():
        if module.__dict__.get("model") is module:
            del module.__dict__["model"]
    model.__class__ = parents(type(model))[1]


def parents(made: type) -> tuple[type, type]:
    """Return the class of the methods and the former class, of which ``made`` was made."""
    known = {value: key for key, value in _classes.items()}
    return next(known[kind] for kind in made.__mro__ if kind in known)  # FSDP makes a subclass of its own


def blank(own: type, base: type) -> Any:
    """Make an empty object of the common subclass, for pickle and deepcopy to fill."""
    made: Any = _subclass(own, base)
    return made.__new__(made)


def _subclass(own: type, base: type) -> type:
    if (own, base) not in _classes:
        more = {"generate": _generate} if hasattr(base, "generate") else {}
        made = type(base.__name__, (own, base), {"__module__": base.__module__, "__doc__": base.__doc__, **more})
        _classes[own, base] = made
    return _classes[own, base]


def _generate(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """Run the base's ``generate``; ``adapter_names``: see :meth:`LoraModel.mixed_batch`."""
    _, base = parents(type(self))
    if adapter_names is None:
        return base.generate(self, *args, **kwargs)  # type: ignore[attr-defined]
    with self.mixed_batch(adapter_names):
        return base.generate(self, *args, **kwargs)  # type: ignore[attr-defined]
