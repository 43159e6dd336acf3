"""Wrappers around a model and its parts, and the names of parameters without them.

``torch.compile``, DDP, FSDP and activation checkpointing put a module around a module, and their own name into every name
below. Names are made canonical here: for injection, settings, saving and loading.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from lorakeet.errors import AdapterError

V = TypeVar("V")
#: Names under which a wrapper keeps the module inside: of torch.compile, FSDP and activation checkpointing.
_INNER = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
#: Settings of an adapter that name modules, in a list, as keys or in a regular expression.
_NAMING = {
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
}
#: Name under which DDP, DataParallel and FSDP keep the model; other modules may have a part of this name.
_PARALLEL = "module"


def canonical(name: str) -> str:
    """Return the name of a module, a parameter or a tensor of a file without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _INNER)


def canonical_keys(values: Mapping[str, V], known: Mapping[str, object]) -> dict[str, V]:
    """Return a state dict, of a wrapped model or not, under the keys of the model itself.

    Args:
        values: The state dict.
        known: The model's own state dict; only its keys count.
    """
    own = {canonical(key): key for key in known}
    plain = {canonical(key): value for key, value in values.items()}
    if not own.keys() & plain.keys():
        plain = {key.removeprefix(f"{_PARALLEL}."): value for key, value in plain.items()}
    return {own.get(key, key): value for key, value in plain.items()}


def canonical_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of an adapter with canonical names of modules, wherever they name some."""
    return {key: _canonical_value(value) if key in _NAMING else value for key, value in settings.items()}


def _canonical_value(value: Any) -> Any:
    if isinstance(value, str):  # one name, or a regular expression of names
        return re.sub(rf"\b({'|'.join(sorted(_INNER))})\\?\.", "", value)
    if isinstance(value, Mapping):
        return {_canonical_value(key): kept for key, kept in value.items()}
    return type(value)(map(_canonical_value, value)) if isinstance(value, (list, tuple, set)) else value


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``; it stays compiled, and so do its parts, but nothing wraps them.

    Raises:
        AdapterError: the model is wrapped for several processes or devices, where new parameters would not be synchronized.
    """
    model = compiled_in_place(model)
    for name, module in list(model.named_modules()):
        if _is_parallel(module):
            raise AdapterError(
                f"the model is wrapped as {type(module).__name__}, which would not synchronize a new adapter",
                "put the adapter on the model inside, and wrap it afterwards",
            )
        if name and is_compiled(module):
            path, _, leaf = canonical(name).rpartition(".")  # wrappers above it are gone already
            model.get_submodule(path)._modules[leaf] = compiled_in_place(module)
    return model


def is_compiled(module: Any) -> bool:
    """Whether a module is the result of ``torch.compile``; none is before the compiler was imported, which takes a second."""
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def compiled_in_place(module: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, compiled itself; any other module as it is."""
    while is_compiled(module):
        outer: Any = module
        module = outer._orig_mod
        module._compiled_call_impl = outer.dynamo_ctx(module._call_impl)  # as nn.Module.compile does
    return module


def _is_parallel(module: nn.Module) -> bool:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return bool(kinds & {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"})


def state_of(model: nn.Module, given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """Return the model's state dict, or the one that was gathered from it or its wrapper, under the model's own keys."""
    own = model.state_dict()
    return own if given is None else canonical_keys(given, own)
