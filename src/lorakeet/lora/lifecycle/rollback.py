"""Rollback of changes that fail: modules, tensors and class of a model are as they were, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: Containers in an attribute whose entries are restored, in the very same object: hooks and tables are held elsewhere.
_CONTAINERS = (dict, list, set)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Restore ``model`` if the block raises anything: classes, attributes, tables, hooks, and which parameters train.

    The tensors themselves are the same objects afterwards; a block that overwrites their values does so last.
    """
    saved = [_Saved(module) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]
    switch = model.__dict__.get("switch")
    was = dict(vars(switch)) if switch is not None else {}
    try:
        yield
    except BaseException:
        for module in saved:
            module.restore()
        for parameter, requires_grad, data in trains:
            parameter.requires_grad_(requires_grad)
            _set_data(parameter, data)
        if switch is not None:
            vars(switch).update(was)
        raise


def _set_data(parameter: nn.Parameter, data: Tensor) -> None:
    if parameter.data_ptr() != data.data_ptr():
        parameter.data = data


class _Saved:
    """Attributes of one module, and the entries of those that are containers."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.attributes = dict(vars(module))
        self.entries = [(value, value.copy()) for value in vars(module).values() if isinstance(value, _CONTAINERS)]

    def restore(self) -> None:
        """Put everything back, and nothing else."""
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for container, entries in self.entries:
            _refill(container, entries)


def _refill(container: Any, entries: Any) -> None:
    if isinstance(container, list):
        container[:] = entries
        return
    container.clear()
    container.update(entries)
