"""The label value of positions that are not in the loss."""

from __future__ import annotations

#: The label of a position that is no target (torch's default ``ignore_index``).
IGNORE_INDEX = -100
