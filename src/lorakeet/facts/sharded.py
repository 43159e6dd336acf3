"""Whether a parameter of a base is sharded over processes."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a shard of one; none is before torch's module of shards was imported, which takes a second."""
    shards: Any = sys.modules.get("torch.distributed.tensor")
    return shards is not None and isinstance(parameter, shards.DTensor)
