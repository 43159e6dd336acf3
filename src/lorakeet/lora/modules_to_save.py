"""Modules that are trained whole (``modules_to_save``), one copy for each adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakeet.lora.layer import ActiveAdapters, row_indices
from lorakeet.lora.peft_names.saved_module import SavedModuleNames
from lorakeet.quant.protocol import dequantized_copy


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
                raise TypeError(
                    f"a {type(self.original_module).__name__} with {parameter.dtype} weights cannot be trained"
                )
            parameter.requires_grad_(True)
        self.modules_to_save[adapter] = clone

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
