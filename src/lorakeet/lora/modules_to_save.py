"""Modules that are trained whole (``modules_to_save``), one copy for each adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lorakeet.errors import TargetError, nearest
from lorakeet.lora.layer import ActiveAdapters, LoraLayer, row_indices
from lorakeet.lora.peft_names.saved_module import SavedModuleNames
from lorakeet.lora.peft_names.words import NO_CONTAINER, ONE_COPY
from lorakeet.quant.protocol import dequantized_copy

#: Containers whose ``forward`` is never called, so a copy in their place would never run.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def chosen_modules(
    modules: Mapping[str, nn.Module], keys: Sequence[str], adapted: Sequence[str], optional: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, bool]]]:
    """Find the modules that ``modules_to_save`` means: as in PEFT, those whose names end with a key.

    Args:
        modules: The model's modules by name, without those inside adapters.
        keys: The setting.
        adapted: Names of the layers and parameters that the same settings adapt.
        optional: Keys that may match nothing.

    Returns:
        The names, without modules inside others that are chosen; and errors, each with whether its key matches nothing.
    """
    found = {key: [name for name in modules if name and name.endswith(key)] for key in keys}
    names = list(dict.fromkeys(name for key in keys for name in found[key]))
    names = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    errors = []
    for key in keys:
        if not found[key] and key not in optional:
            similar = ", ".join(nearest(key, {name.rpartition(".")[2] for name in modules if name})) or "none"
            errors.append((f"modules_to_save names {key!r}, which is not in this model (similar: {similar})", True))
    for name in names:
        inside = [layer for layer in adapted if layer == name or layer.startswith(f"{name}.")]
        if error := _module_error(modules[name], inside):
            errors.append((f"modules_to_save: {name!r} {error}", False))
    return tuple(names), errors


def _module_error(module: nn.Module, adapted: Sequence[str]) -> str | None:
    """Return why a module cannot be trained whole; None if it can."""
    base = module.original_module if isinstance(module, SavedModule) else module
    if isinstance(base, _CONTAINERS):
        return f"is never called itself, name the modules in it: {NO_CONTAINER.format(kind=type(base).__name__)}"
    if adapted:
        return f"would be trained whole and adapted ({adapted[0]}): name it in one of the settings"
    inner = (part for part in base.modules() if isinstance(part, (LoraLayer, SavedModule)))
    if any(part.adapters for part in inner):
        return "is adapted by another adapter, or a part of it is"
    return None


class SavedModule(SavedModuleNames):
    """The base's module and a trainable copy for each adapter that asked for it; the active adapter's copy runs."""

    def __init__(self, original_module: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.switch = switch

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that have a copy."""
        return list(self.modules_to_save)

    def add_adapter(self, adapter: str) -> None:
        """Add the adapter's copy, with the base's values, in a number format that can be trained."""
        clone = dequantized_copy(self.original_module)
        for parameter in clone.parameters():
            if not parameter.is_floating_point():
                kind = type(self.original_module).__name__
                raise TargetError(
                    f"modules_to_save: a {kind} with {parameter.dtype} weights cannot be trained", "adapt it with LoRA"
                )
            parameter.requires_grad_(True)
        self.modules_to_save[adapter] = clone

    def conflict(self, adapters: Sequence[str]) -> str | None:
        """Return why these adapters cannot act together here; None if they can."""
        here = [adapter for adapter in dict.fromkeys(adapters) if adapter in self.modules_to_save]
        kind = type(self.original_module).__name__
        return f"{ONE_COPY}, and each has its own copy of a {kind}" if len(here) > 1 else None

    def delete_adapter(self, adapter: str) -> None:
        """Delete the adapter's copy."""
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Make the adapter's copy trainable, or freeze it."""
        if adapter in self.modules_to_save:
            self.modules_to_save[adapter].requires_grad_(trainable)

    def parts(self, adapter: str) -> list[nn.Parameter]:
        """Return the parameters of the adapter's copy."""
        return list(self.modules_to_save[adapter].parameters())

    def share_weight(self, source: SavedModule, adapter: str) -> None:
        """Let the adapter's copy train the very weight that its copy of ``source`` trains."""
        weight: Any = source.modules_to_save[adapter].weight
        self.modules_to_save[adapter].weight = weight

    @property
    def current(self) -> nn.Module:
        """The module that runs now."""
        for adapter in self.switch.active if self.switch.enabled else ():
            if adapter in self.modules_to_save:
                return self.modules_to_save[adapter]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.switch.rows if self.switch.enabled else None
        if rows is not None and any(adapter in self.modules_to_save for adapter in rows):
            return self._forward_by_row(rows, *args, **kwargs)
        return self.current(*args, **kwargs)

    def _forward_by_row(self, rows: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run a mixed batch: the rows of each adapter through its own copy."""
        h: Tensor = self.original_module(x, *args, **kwargs)
        for adapter, indices in row_indices(rows, x):
            if adapter in self.modules_to_save:
                own: Tensor = self.modules_to_save[adapter](x[indices], *args, **kwargs)
                h = h.index_copy(0, indices, own.to(h.dtype))
        return h

    def __getattr__(self, name: str) -> Any:
        # ``weight``, ``out_features`` and the like, for code that does not know about adapters
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "modules_to_save" not in self._modules:
                raise
            return getattr(self.current, name)
