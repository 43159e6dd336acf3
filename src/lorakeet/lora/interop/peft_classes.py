"""Answers to ``isinstance(..., peft.PeftModel)`` and the like: transformers, accelerate and TRL decide by ``peft``'s classes.

``peft`` is never imported here and its code never runs on Lorakeet's objects. Once somebody else has imported it, the
attribute ``__class__`` is a subclass of the object's own type, with ``peft``'s class last among its bases. So ``isinstance``
is true, while ``type()`` and all other attributes stay Lorakeet's own. ``unittest.mock`` answers in the same way.
"""

from __future__ import annotations

import copyreg
import sys
import types
from typing import Any, ClassVar

from lorakeet.lora.interop.trainer_hooks import hook_peft, hook_trainer

#: (Own class, peft's class) -> the class that isinstance sees.
_twins: dict[tuple[type, type], type] = {}
#: Class that a tool built on a twin -> the same class, built on the own class.
_rebuilt: dict[type, type] = {}


class AnswersAsPeft:
    """Base of a class whose instances pass for one of ``peft``'s classes.

    Attributes:
        peft_class: Module and name of that class.
    """

    peft_class: ClassVar[tuple[str, str]]

    def _class(self) -> type:
        own = type(self)
        hook_trainer()
        module, name = own.peft_class
        asked = getattr(sys.modules.get(module), name, None)
        if not isinstance(asked, type) or issubclass(own, asked) or not hook_peft():
            return own
        return _twins.get((own, asked)) or _twin(own, asked)

    def _set_class(self, value: type) -> None:
        object.__dict__["__class__"].__set__(self, _without_twin(value))

    __class__ = property(_class, _set_class)  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, arguments, *rest = tuple(super().__reduce_ex__(protocol))
        # pickle compares the class that copyreg makes with __class__
        return (_new if made is copyreg.__newobj__ else made), arguments, *rest  # type: ignore[attr-defined]


def _without_twin(value: type) -> type:
    """Return the class that a tool built on ``__class__`` (FSDP does), built on the object's own class instead."""
    own = {twin: key[0] for key, twin in _twins.items()}
    if value in own:
        return own[value]
    if not any(base in own for base in value.__bases__):
        return value
    if value not in _rebuilt:
        bases = tuple(own.get(base, base) for base in value.__bases__)
        namespace = {name: kept for name, kept in vars(value).items() if name not in ("__dict__", "__weakref__")}
        _rebuilt[value] = types.new_class(value.__name__, bases, exec_body=lambda body: body.update(namespace))
    return _rebuilt[value]


def _new(made: type, *arguments: Any) -> Any:
    return made.__new__(made, *arguments)


def _twin(own: type, asked: type) -> type:
    """Return the subclass of ``own`` that ``isinstance`` sees."""

    def order(cls: type) -> list[type]:
        found = type.mro(cls)
        return [*found[:-1], *(kind for kind in asked.__mro__ if kind not in found), object]

    def call(cls: Any, *arguments: Any, **settings: Any) -> Any:
        made = own if cls is _twins[own, asked] else cls  # value.__class__(...) makes another of the own class
        return type(own).__call__(made, *arguments, **settings)

    kind = type("_Twin", (type(own),), {"mro": order, "__call__": call})
    namespace = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    _twins[own, asked] = type.__new__(kind, own.__name__, (own,), namespace)
    return _twins[own, asked]
