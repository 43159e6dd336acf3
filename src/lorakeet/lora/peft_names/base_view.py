"""The path ``model.base_model``: the base's own backbone, with PEFT's view of the whole model added.

In ``peft``, ``model.base_model`` is a wrapper around the base, and ``model.base_model.model`` the base. In ``transformers``,
``model.base_model`` is the backbone below the head. Nothing is wrapped here, so both must hold of one object:

    model.base_model.model            the model itself
    model.base_model.set_adapter      the model's own verbs
    model.base_model.layers           the backbone's parts, or else the model's
    isinstance(model.base_model, type of the backbone)
"""

from __future__ import annotations

from typing import Any

_classes: dict[tuple[type, type], type] = {}


class _View:
    """A module seen as PEFT's wrapper. It shares the module's attributes; those of the whole model are added."""

    __slots__ = ()
    _whole: Any
    _own: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._own(*args, **kwargs)  # the view's ``model`` is another one than that in the module's forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._own.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            return getattr(self._whole, name)

    def __eq__(self, other: object) -> bool:
        return getattr(other, "__dict__", None) is self.__dict__

    def __hash__(self) -> int:
        return id(self.__dict__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return view_of, (self._whole,)


def view_of(model: Any) -> Any:
    """Return ``model.base_model``: the model itself where that is PEFT's wrapper and base in one, else a view."""
    own = model._modules.get("base_model")
    backbone = own if own is not None else model._modules.get(getattr(model, "base_model_prefix", "") or "-", model)
    if backbone is model and getattr(model, "model", None) is model:
        return model
    view: Any = object.__new__(_view_class(type(model), type(backbone)))
    view.__dict__ = backbone.__dict__
    object.__setattr__(view, "_whole", model)
    object.__setattr__(view, "_own", backbone)
    return view


def _view_class(whole: type, backbone: type) -> type:
    """Return the class of a view: the backbone's methods, but those that LoRA adds are the whole model's."""
    if (whole, backbone) not in _classes:
        added = {name for parent in whole.__mro__ if parent.__module__.startswith("lorakeet.") for name in vars(parent)}
        plain = {"__slots__": ("_whole", "_own"), "__module__": backbone.__module__, "__doc__": backbone.__doc__}
        verbs = {name: _of_whole(name) for name in added if not name.startswith("__")}
        paths = {"model": property(lambda view: view._whole), "base_model": property(lambda view: view)}
        bases = (_View, backbone if not issubclass(backbone, whole) else whole)
        _classes[whole, backbone] = type(backbone.__name__, bases, {**plain, **verbs, **paths})
    return _classes[whole, backbone]


def _of_whole(name: str) -> property:
    return property(lambda view: getattr(view._whole, name))


def lead_to_model(model: Any) -> None:
    """Make PEFT's paths ``model.model`` and ``model.model.model`` lead where they lead there, as far as they are free.

    Without a part named ``model``, ``model.model`` is the model. With one (the backbone of a language model), that part's
    own ``model`` is itself: PEFT's ``model.model.model`` is the backbone.
    """
    inner = model._modules.get("model", model)
    if not hasattr(inner, "model"):
        inner.__dict__["model"] = inner
