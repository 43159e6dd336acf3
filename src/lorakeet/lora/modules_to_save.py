"""Modules trained whole beside the low-rank pairs (``modules_to_save``), one copy for each adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakeet.lora.layer import ActiveAdapters, row_places
from lorakeet.quant.protocol import dequantized_copy


class SavedModule(nn.Module):
    """Holds the base's module and, for each adapter that asked for it, a trainable copy; the active one answers."""

    def __init__(self, original_module: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.switch = switch

    def add_adapter(self, adapter: str) -> None:
        """Start the adapter's copy from the base's values, in a number format that can learn."""
        clone = dequantized_copy(self.original_module)
        for parameter in clone.parameters():
            if not parameter.is_floating_point():
                raise TypeError(
                    f"a {type(self.original_module).__name__} with {parameter.dtype} weights cannot be trained"
                )
            parameter.requires_grad_(True)
        self.modules_to_save[adapter] = clone

    def delete_adapter(self, adapter: str) -> None:
        """Forget the adapter's copy."""
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Whether the adapter's copy learns."""
        if adapter in self.modules_to_save:
            self.modules_to_save[adapter].requires_grad_(trainable)

    @property
    def current(self) -> nn.Module:
        """The module that answers now."""
        for adapter in self.switch.active if self.switch.enabled else ():
            if adapter in self.modules_to_save:
                return self.modules_to_save[adapter]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.switch.rows if self.switch.enabled else None
        if rows is not None and any(adapter in self.modules_to_save for adapter in rows):
            return self._row_by_row(rows, *args, **kwargs)
        return self.current(*args, **kwargs)

    def _row_by_row(self, rows: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A mixed batch: the rows of each adapter through its own copy, then back to their places."""
        h: Tensor = self.original_module(x, *args, **kwargs)
        for adapter, places in row_places(rows, x):
            if adapter in self.modules_to_save:
                own: Tensor = self.modules_to_save[adapter](x[places], *args, **kwargs)
                h = h.index_copy(0, places, own.to(h.dtype))
        return h

    def __getattr__(self, name: str) -> Any:
        # ``weight``, ``out_features`` and the like, asked for by code that does not know about adapters
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "modules_to_save" not in self._modules:
                raise
            return getattr(self.current, name)


def share_copy(module: nn.Module, first: SavedModule, adapter: str) -> None:
    """Let the adapter's copy of ``module`` learn the very weight that its copy of ``first`` learns."""
    assert isinstance(module, SavedModule)
    weight: Any = first.modules_to_save[adapter].weight
    module.modules_to_save[adapter].weight = weight
