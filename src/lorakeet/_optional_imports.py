"""Hide optional packages from `transformers`, which imports them whenever they are installed.

The command line never needs ``peft`` and ``bitsandbytes``, and needs scikit-learn and scipy only for a few metrics. Hiding
them saves a third of the start-up time and 140 MB of memory in training. It never needs the compiler of torch either, nor, in
a command of one process, its tensors of several processes: these two take as long to import as torch itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType, NoneType
from typing import Any

NEVER_NEEDED = ("peft", "bitsandbytes")
NEEDED_LATE = ("sklearn", "scipy")
#: The compiler of torch, and its module that transformers takes a name from.
_COMPILER, _TRANSFORMS = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"
#: The module of it with the class of compiled modules, which accelerate looks for.
_FRAMES = "torch._dynamo.eval_frame"


def hide_optional_packages() -> None:
    """Hide the packages from every later import of this process; a program calls it before it imports transformers."""
    for name in (*NEVER_NEEDED, *NEEDED_LATE):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    _hide_compiler()


def allow_sklearn() -> None:
    """Undo the hiding of scikit-learn and scipy; call it before they are imported."""
    for name in NEEDED_LATE:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]


class _Late(ModuleType):
    """A package that is imported when something of it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)


def import_late(name: str) -> None:
    """Let a package be imported when something of it is first asked for; for commands that may never ask."""
    spec = importlib.util.find_spec(name) if name not in sys.modules else None
    if spec is not None:
        late = sys.modules[name] = _Late(name)
        late.__spec__, late.__file__, late.__loader__ = spec, spec.origin, spec.loader
        late.__package__, late.__path__ = name, list(spec.submodule_search_locations or ())


class _StandIn(ModuleType):
    """A module of torch's compiler, with what others take from it at once; all else imports the module itself."""

    def __init__(self, name: str, meanwhile: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__dict__["_meanwhile"] = meanwhile

    def __getattr__(self, name: str) -> Any:
        if name in self._meanwhile and sys.modules.get(self.__name__) is self:
            return self._meanwhile[name]
        is_path = name == "__path__" and self.__name__ == _COMPILER  # asked for by imports of what is inside
        if name.startswith("__") and not is_path:  # of those who look through all modules
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_real(self.__name__), name)


def _hide_compiler() -> None:
    """Let torch's compiler be imported when something is compiled, and not by marks for it on functions of others."""
    meanwhile: dict[str, dict[str, Any]] = {
        _COMPILER: {
            **dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result"), _marked),
            "graph_break": lambda msg="": None,
        },
        _TRANSFORMS: {"TransformGetItemToIndex": _index_transform},
        _FRAMES: {"OptimizedModule": type("OptimizedModule", (), {})},  # nothing is compiled yet
    }
    if not any(name in sys.modules for name in meanwhile):
        sys.modules.update({name: _StandIn(name, given) for name, given in meanwhile.items()})
        meanwhile[_COMPILER]["eval_frame"] = sys.modules[_FRAMES]


def has_compiler() -> bool:
    """Whether torch's compiler is imported already."""
    return not isinstance(sys.modules.get(_COMPILER), (_StandIn, NoneType))


def _marked(function: Any = None, *args: Any, **options: Any) -> Any:
    """Return a function as it is, or a decorator that does: what is not compiled needs no mark for the compiler."""
    return function if function is not None else lambda other: other


def _index_transform() -> Any:
    return _real(_TRANSFORMS).TransformGetItemToIndex()


def _real(name: str) -> ModuleType:
    """Return a module itself; none of them has a stand-in any more."""
    for other, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            del sys.modules[other]
    return importlib.import_module(name)


class _Before:
    """Finder that finds nothing, and calls a function before a module is imported."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self._name, self._function = name, function

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> None:
        """Call the function, if the module is to be imported; find nothing."""
        if name == self._name:
            sys.meta_path.remove(self)
            self._function()


def hide_distributed() -> None:
    """Let `transformers` see no distributed package of torch, in a process that is the only one."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 and "transformers.distributed" not in sys.modules:
        sys.meta_path.insert(0, _Before("transformers.distributed", _answer_distributed))


def _answer_distributed() -> None:
    """Let transformers ask once, and remember, whether torch has a distributed package."""
    distributed: Any = importlib.import_module("torch.distributed")
    ask = importlib.import_module("transformers.utils.import_utils").is_torch_distributed_available
    is_there, distributed.is_available = distributed.is_available, lambda: False
    try:
        ask()
    finally:
        distributed.is_available = is_there
