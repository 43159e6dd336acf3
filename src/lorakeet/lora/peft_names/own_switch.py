"""A layer's own choice of adapters, where a program switches single layers instead of the model."""

from __future__ import annotations

from typing import Any


class OwnSwitch:
    """The active adapters of one layer; a mixed batch and a disabled model hold for it as for all.

    Attributes:
        shared: The active adapters of the model.
        active: Names of the layer's active adapters.
    """

    def __init__(self, shared: Any) -> None:
        self.shared, self.active, self._enabled = shared, shared.active, True

    @property
    def enabled(self) -> bool:
        """Whether any adapter acts in this layer."""
        return self._enabled and self.shared.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled

    @property
    def rows(self) -> tuple[str, ...] | None:
        """In a mixed batch, the adapter of each row."""
        return self.shared.rows


def own_switch(layer: Any) -> OwnSwitch:
    """Return the layer's own switch; it is made if the layer uses the model's."""
    if not isinstance(layer.switch, OwnSwitch):
        layer.switch = OwnSwitch(layer.switch)
    return layer.switch
